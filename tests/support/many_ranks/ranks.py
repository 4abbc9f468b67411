"""Several processes of one script on this machine, which find each other as those of torchrun do."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

__all__ = ["reports", "run_ranks", "start_ranks"]

ROOT = Path(__file__).parents[3]
SEARCHED = (ROOT / ".alias", ROOT / "tests" / "support", ROOT / "examples" / "trainers")
# What takes most of a process's time to import. The server of these processes does so once, and forks them.
_HEAVY: Final = (
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "peft",
    "many_ranks.failing_ranks",
)
_SERVER: Final = multiprocessing.get_context("forkserver")


def run_ranks(
    script: Path, *arguments: str, ranks: int = 2, seconds: float = 240.0, ends: Sequence[int] | None = None
) -> list[str]:
    """Run a script in ``ranks`` processes at once, and fail if one ends otherwise than by ``ends``; return what each wrote.

    They begin with what is heavy imported already.
    """
    _SERVER.set_forkserver_preload([*_HEAVY])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(ranks)]
        started = [
            _SERVER.Process(target=_run, args=(str(script), arguments, {**os.environ, **environment}, str(output)))
            for environment, output in zip(_environments(ranks), outputs, strict=True)
        ]
        codes = _ended(started, seconds)
        written = [output.read_text() if output.exists() else "" for output in outputs]
    assert codes == [*(ends or [0] * ranks)], "\n".join(written)
    return written


def _ended(processes: Sequence[BaseProcess], seconds: float) -> list[int | None]:
    """Start processes and return how they end; None of one that has to be killed, as it did not end in time."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
        process.close()
    return codes


def _run(script: str, arguments: Sequence[str], environment: dict[str, str], output: str) -> None:
    """Be a process that was started as ``python script arguments``, and write to a file."""
    os.environ.clear()  # that of the server, which may be older than what a test has set
    os.environ.update(environment)
    sys.path[:0] = [str(Path(script).parent), *map(str, SEARCHED)]
    written = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def reports(folder: Path, ranks: int, prefix: str = "") -> list[Any]:
    """Return what each of ``ranks`` processes has written as JSON into a folder, under the prefix and its rank."""
    return [json.loads((folder / f"{prefix}{rank}.json").read_text()) for rank in range(ranks)]


def start_ranks(script: Path, *arguments: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """Start a script in ``ranks`` processes at once."""
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in _environments(ranks)
    ]


def _environments(ranks: int) -> list[dict[str, str]]:
    """Return what torchrun tells each process, and where it finds what it imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "PYTHONPATH": os.pathsep.join(map(str, SEARCHED)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
