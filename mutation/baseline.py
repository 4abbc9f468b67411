"""The tests on the code as it is: how long each takes, and which lines each runs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, final

import pytest
from coverage import Coverage

from .forks import Ended

__all__ = ["Baseline", "Outcome", "digest", "record", "run", "shards"]


@final
@dataclass
class Outcome:
    """A pytest plugin that knows how the test that runs has ended."""

    passed: bool = False
    failed: bool = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take note of a phase of the test."""
        self.passed |= report.when == "call" and report.passed
        self.failed |= report.failed


@final
@dataclass
class Baseline:
    """What is known of the tests.

    Attributes:
        modules: a digest of the modules whose lines are known.
        files: a digest of each file of tests that has been run.
        seconds: of each test that passed.
        tests: the tests that run a line, by path and line.
        failed: the tests that fail on the code as it is.
    """

    modules: str = ""
    files: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tests: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, modules: str) -> Baseline:
        """Return what an earlier run has written, or nothing if there is no such file, or it is of other modules."""
        saved = json.loads(path.read_text()) if path.exists() else {}
        if saved.get("modules") != modules:
            return cls(modules)
        tests = {
            module: {int(line): names for line, names in lines.items()} for module, lines in saved["tests"].items()
        }
        return cls(**{**saved, "tests": tests})

    def write(self, path: Path) -> None:
        """Write everything, for `read`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))

    def forget(self, files: Mapping[str, str]) -> None:
        """Drop the tests of files that have changed, and those that failed.

        Args:
            files: the digests as they are now.
        """
        failed = {name.split("::")[0] for name in self.failed}
        kept = {name for name, known in self.files.items() if files.get(name, known) == known} - failed
        self.files = {name: known for name, known in self.files.items() if name in kept}
        self.seconds = {test: taken for test, taken in self.seconds.items() if test.split("::")[0] in kept}
        self.failed = []
        for lines in self.tests.values():
            for line, tests in lines.items():
                lines[line] = [test for test in tests if test.split("::")[0] in kept]

    def add(self, parts: Iterable[Ended]) -> None:
        """Take in what several processes recorded."""
        for part in parts:
            if part.result is None:
                raise RuntimeError(f"signal {part.signal} ended the tests on the code as it is")
            self.seconds |= part.result["seconds"]
            self.failed += part.result["failed"]
            for path, lines in part.result["tests"].items():
                known = self.tests.setdefault(path, {})
                for line, names in lines.items():
                    known.setdefault(int(line), []).extend(names)

    def of_lines(self, path: Path, lines: tuple[int, int]) -> list[str]:
        """Return the tests that run one of these lines, and pass."""
        known = self.tests.get(str(path), {})
        found = {test for line in range(lines[0], lines[1] + 1) for test in known.get(line, ())}
        return sorted(found & self.seconds.keys())

    def breadth(self) -> Counter[str]:
        """Return how many lines each test runs."""
        return Counter(test for lines in self.tests.values() for tests in lines.values() for test in set(tests))


def digest(*paths: Path) -> str:
    """Return a digest of some files, in their order."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def run(item: pytest.Item, following: pytest.Item | None) -> Outcome:
    """Run one test as pytest does, and return how it ended."""
    outcome = Outcome()
    item.config.pluginmanager.register(outcome)
    try:
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
    finally:
        item.config.pluginmanager.unregister(outcome)
    return outcome


def record(items: Sequence[pytest.Item], paths: Collection[Path]) -> dict[str, Any]:
    """Run the tests, and return what a `Baseline` is made of."""
    coverage = Coverage(data_file=None, config_file=False, include=[str(path) for path in paths])
    seconds, failed = {}, []
    coverage.start()
    for item, following in zip(items, [*items[1:], None], strict=True):
        coverage.switch_context(item.nodeid)
        start = perf_counter()
        outcome = run(item, following)
        if outcome.passed and not outcome.failed:
            seconds[item.nodeid] = perf_counter() - start
        elif outcome.failed:
            failed.append(item.nodeid)
    coverage.stop()
    data = coverage.get_data()
    tests = {path: data.contexts_by_lineno(path) for path in data.measured_files()}
    return {"seconds": seconds, "failed": failed, "tests": tests}


def shards(items: Sequence[pytest.Item], count: int) -> list[list[pytest.Item]]:
    """Return the tests in so many parts of about one size, with the tests of a file in one of them."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    parts: list[list[pytest.Item]] = [[] for _ in range(count)]
    for tests in sorted(files.values(), key=len, reverse=True):
        min(parts, key=len).extend(tests)
    return [part for part in parts if part]
