"""Mutation testing: ``python -m mutation [--only functional ...]``.

Changes the loss and gradient code in one place at a time, and asks of the suite that a test fails. Writes a report, and ends
with status 1 where too many mutants survive.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pytest

from .equivalents import NAMED
from .report import line, markdown, read, score
from .runner import Runner
from .sites import Mutant
from .targets import modules, mutants

RESULTS: Final = "results.jsonl"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[], help="functional, losses, backends, or a part of a path under src"
    )
    parser.add_argument("--tests", nargs="*", help="files and folders of tests, instead of those of the targets")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument(
        "--again", action="store_true", help="only what earlier runs have not killed; go on with their report"
    )
    parser.add_argument(
        "--equivalents", action="store_true", help="only the named equivalents: none of them should be killed"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mutation-report"),
        help="folder for report.md, results.jsonl and baseline.json",
    )
    quick = "seconds of tests for one mutant, for a quick look; what survives it is tried on all of them by --again"
    parser.add_argument("--patience", type=float, default=math.inf, help=quick)
    parser.add_argument("--at-least", type=float, default=0.95, help="the share that must be killed")
    parser.add_argument("--list", action="store_true", help="print the mutants, and try none")
    return parser.parse_args()


def attempt(root: Path, found: Sequence[Mutant], asked: argparse.Namespace) -> None:
    """Try mutants on the tests of their targets, and write each result down.

    Raises:
        SystemExit: the tests cannot be collected, or fail on the code as it is.
    """
    importlib.import_module("torch._dynamo")  # once, not in every process that compiles
    tests = asked.tests or sorted({test for _, target in modules(root, asked.only) for test in target.tests})
    every = [path.relative_to(root) for path, _ in modules(root)]
    with tempfile.TemporaryDirectory() as folder, (asked.out / RESULTS).open("a", buffering=1) as results:
        os.environ |= {"HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis", "HYPOTHESIS_PROFILE": "unshrunk"}
        write = partial(print, file=results)
        saved = asked.out / "baseline.json"
        runner = Runner(root, every, found, saved, asked.workers, Path(folder), lambda result: write(line(result)))
        runner.patience = asked.patience
        # The sources that an editable install lists beside a pytest plugin are these; they need no rewriting.
        imported = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
        options = [
            *imported,
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--no-header",
            f"--basetemp={folder}/pytest",
        ]
        if pytest.main([*options, *tests], plugins=[runner]) != 0:
            raise SystemExit(2)


def main() -> int:
    """Run, and return the status."""
    asked, root, start = arguments(), Path.cwd(), time.perf_counter()
    everything = list(mutants(root, asked.only))
    same = [mutant for mutant in everything if any(known.covers(mutant) for known in NAMED)]
    found = same if asked.equivalents else [mutant for mutant in everything if mutant not in set(same)]
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.again:
        (asked.out / RESULTS).unlink(missing_ok=True)
    killed = {result.mutant for result in read(asked.out / RESULTS, found) if result.killed}
    left = [mutant for mutant in found if mutant not in killed]
    if asked.list:
        print("\n".join(f"{m.path}:{m.lines[0]} {m.function} {m.operator}: {m.change}" for m in left))
        return 0
    if left:
        attempt(root, left, asked)
    results = read(asked.out / RESULTS, found)
    facts = {
        "date": datetime.date.today().isoformat(),
        "tier": os.environ.get("PULLBACK_TIER", "quick"),
        "Python": platform.python_version(),
        "torch": version("torch"),
        "this run": f"{len(left)} mutants in {(time.perf_counter() - start) / 60:.0f} minutes by {asked.workers} workers",
    }
    text = markdown(results, [] if asked.equivalents else same, facts, root)
    (asked.out / "report.md").write_text(text)
    print(text)
    if asked.equivalents:
        return int(any(result.killed for result in results))
    return int(score(results) < asked.at_least)


if __name__ == "__main__":
    sys.exit(main())
