"""Everything that is printed as code runs as printed."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path) -> None:
    """The Python blocks of a page run in order, in one namespace."""
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda e: e.name)
def test_examples_run(example: Path) -> None:
    """Every example runs."""
    runpy.run_path(str(example))


def test_tiny_demo(tmp_path: Path) -> None:
    """`pullback demo --model tiny` improves all four objectives and leaves a picture and the figures."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".alias")}
    command = [
        sys.executable,
        "-m",
        "pullback.cli",
        "demo",
        "--model",
        "tiny",
        "--minutes",
        "0.5",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("improved") == 4
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    assert '"improved": true' in (tmp_path / "results.json").read_text()
