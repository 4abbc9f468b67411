"""Several processes of one script on this machine, which find each other as those of torchrun do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ports import reserved_port

__all__ = ["found_by_ranks", "reports", "run_ranks", "start_ranks"]

ROOT = Path(__file__).parents[3]
SEARCHED = (ROOT / ".alias", ROOT / "tests" / "support", ROOT / "examples" / "trainers")


def run_ranks(
    script: Path, *arguments: str, ranks: int = 2, seconds: float = 600.0, ends: Sequence[int] | None = None
) -> list[str]:
    """Run a script in ``ranks`` processes at once, and fail if one ends otherwise than by ``ends``; return what each wrote."""
    started = start_ranks(script, *arguments, ranks=ranks)
    try:
        written = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [*(ends or [0] * ranks)], "\n".join(written)
    return written


def reports(folder: Path, ranks: int, prefix: str = "") -> list[Any]:
    """Return what each of ``ranks`` processes has written as JSON into a folder, under the prefix and its rank."""
    return [json.loads((folder / f"{prefix}{rank}.json").read_text()) for rank in range(ranks)]


def found_by_ranks(script: Path, folder: Path, *arguments: str, ranks: int = 2, seconds: float = 300.0) -> list[Any]:
    """Run a script in ``ranks`` processes, and return what each has written into a folder as its finding."""
    run_ranks(script, str(folder / "found"), *arguments, ranks=ranks, seconds=seconds)
    return reports(folder, ranks, "found-")


def start_ranks(script: Path, *arguments: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """Start a script in ``ranks`` processes at once."""
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, SEARCHED)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(reserved_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
