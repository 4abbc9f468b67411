"""Mutation testing: ``python -m mutation [--only functional ...]``.

Changes the loss and gradient code in one place at a time, and asks of the suite that a test fails. Writes a report, and ends
with status 1 where too many mutants survive.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from .equivalents import NAMED
from .report import markdown, read_survivors, score, to_json
from .runner import Result, Runner
from .sites import Mutant
from .targets import modules, mutants


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[], help="functional, losses, backends, or a part of a path under src"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--again", type=Path, help="the report.json of an earlier run: only what survived it")
    parser.add_argument(
        "--equivalents", action="store_true", help="only the named equivalents: none of them should be killed"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mutation-report"), help="folder for report.md and report.json"
    )
    parser.add_argument("--at-least", type=float, default=0.95, help="the share that must be killed")
    parser.add_argument("--list", action="store_true", help="print the mutants, and try none")
    return parser.parse_args()


def attempt(root: Path, found: Sequence[Mutant], asked: argparse.Namespace) -> list[Result]:
    """Try mutants on the tests of their targets.

    Raises:
        SystemExit: the tests cannot be collected, or fail on the code as it is.
    """
    importlib.import_module("torch._dynamo")  # once, not in every process that compiles
    tests = sorted({test for _, target in modules(root, asked.only) for test in target.tests})
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{folder}/hypothesis"
        every = [path.relative_to(root) for path, _ in modules(root)]
        runner = Runner(root, every, found, asked.out / "baseline.json", asked.workers, Path(folder))
        options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", f"--basetemp={folder}/pytest"]
        if pytest.main([*options, *tests], plugins=[runner]) != 0:
            raise SystemExit(2)
    return runner.results


def main() -> int:
    """Run, and return the status."""
    asked, root, start = arguments(), Path.cwd(), time.perf_counter()
    everything = list(mutants(root, asked.only))
    same = [mutant for mutant in everything if any(known.covers(mutant) for known in NAMED)]
    found = same if asked.equivalents else [mutant for mutant in everything if mutant not in set(same)]
    if asked.again:
        left = read_survivors(asked.again)
        found = [mutant for mutant in found if mutant.key in left]
    if asked.list:
        print("\n".join(f"{m.path}:{m.lines[0]} {m.function} {m.operator}: {m.before} -> {m.after}" for m in found))
        return 0
    results = attempt(root, found, asked)
    facts = {
        "date": datetime.date.today().isoformat(),
        "tier": os.environ.get("PULLBACK_TIER", "quick"),
        "Python": platform.python_version(),
        "torch": version("torch"),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "workers": asked.workers,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    named = [] if asked.equivalents else same
    (asked.out / "report.md").write_text("# Mutation testing\n\n" + markdown(results, named, facts, root))
    (asked.out / "report.json").write_text(to_json(results, named, facts))
    print(markdown(results, named, facts, root))
    if asked.equivalents:
        return int(any(result.killed for result in results))
    return int(score(results) < asked.at_least)


if __name__ == "__main__":
    sys.exit(main())
