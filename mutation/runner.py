"""The runner: a pytest plugin that collects the tests once, and lets a forked process for each mutant run some of them."""

from __future__ import annotations

import gc
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any, Final, final

import pytest

from .baseline import Baseline, digest, record, run, shards
from .forks import Ended, Job, in_forks, limit
from .install import Live, install, live_functions
from .sites import Mutant

__all__ = ["Result", "Runner"]

_TIME_IS_UP: Final = (signal.SIGALRM, signal.SIGPROF)


@final
@dataclass(frozen=True)
class Result:
    """What became of a mutant.

    Attributes:
        mutant: the change.
        status: ``killed`` by a test that failed, by the ``time`` limit or by a ``crash``; ``survived``; ``untested``: no test
            runs its lines.
        test: the one that failed.
        tests: how many would have run.
    """

    mutant: Mutant
    status: str
    test: str = ""
    tests: int = 0

    @property
    def killed(self) -> bool:
        """Whether the tests notice."""
        return self.status in ("killed", "time", "crash")


@final
@dataclass
class Runner:
    """Tries mutants on the tests that pytest has collected.

    Attributes:
        root: of the modules' paths.
        modules: the paths of those whose lines are watched, as many as the mutants of this and later runs have.
        mutants: what is tried.
        saved: the file that the baseline is read from, and written to.
        workers: processes at a time.
        folder: for what processes leave, and away from the tree.
        found: is told of each result, when there is one.
        seconds: at least so many for one test, of its processor's time.
        patience: seconds of tests for one mutant, for a quick look: what survives it may be killed by the tests left out.
        baseline: the tests on the code as it is.
    """

    root: Path
    modules: Sequence[Path]
    mutants: Sequence[Mutant]
    saved: Path
    workers: int
    folder: Path
    found: Callable[[Result], None]
    seconds: float = 10.0
    patience: float = math.inf
    baseline: Baseline = field(default_factory=Baseline)
    _kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    _breadth: Counter[str] = field(default_factory=Counter)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run every test on the code as it is, and for each mutant those that run its lines, until one fails."""
        if session.testsfailed:
            raise session.Failed(f"{session.testsfailed} errors during collection")
        items = {item.nodeid: item for item in session.items}
        self.baseline = self._recorded(session.items)
        if self.baseline.failed:
            self._say(f"these fail on the code as it is: {', '.join(self.baseline.failed)}")
            raise session.Failed("tests fail on the code as it is")
        self._say(f"{len(self.baseline.seconds)} tests in {sum(self.baseline.seconds.values()):.0f} s")
        self._breadth = self.baseline.breadth()
        paths = sorted({self._path(mutant) for mutant in self.mutants})
        sources, live = {path: path.read_text() for path in paths}, live_functions(paths)
        gc.freeze()  # else each process goes over, and so copies, everything that was collected here
        self._try(items, sources, live)
        return True

    def _recorded(self, items: Sequence[pytest.Item]) -> Baseline:
        """Return the tests on the code as it is; only files of tests that have changed since it was saved are run."""
        modules = sorted((self.root / path).resolve() for path in self.modules)
        baseline = Baseline.read(self.saved, digest(*modules))
        files = {item.nodeid.split("::")[0]: digest(item.path) for item in items}
        baseline.forget(files)
        new = [item for item in items if item.nodeid.split("::")[0] not in baseline.files]
        parts = [Job("tests", partial(record, part, modules)) for part in shards(new, self.workers)]
        baseline.add(in_forks(parts, self.workers, self.folder))
        baseline.files |= files
        baseline.write(self.saved)
        return baseline

    def _try(self, items: Mapping[str, pytest.Item], sources: Mapping[Path, str], live: Live) -> None:
        start, done = perf_counter(), 0
        for ended in in_forks(self._jobs(items, sources, live), self.workers, self.folder):
            result, done = self._result(ended), done + 1
            self.found(result)
            self._kills.update((scope, result.test) for scope in _scopes(result.mutant) if result.test)
            if not result.killed or done % 50 == 0:
                m, at = result.mutant, f"{done}/{len(self.mutants)} {perf_counter() - start:.0f} s"
                self._say(f"{at} {result.status}: {m.path}:{m.lines[0]} {m.function} {m.operator} {m.change}")

    def _jobs(self, items: Mapping[str, pytest.Item], sources: Mapping[Path, str], live: Live) -> Iterator[Job]:
        """Yield a job for each mutant that some test runs; the tests that killed its neighbours come first."""
        for mutant in self.mutants:
            path = self._path(mutant)
            names = [name for name in self.baseline.of_lines(path, mutant.lines) if name in items]
            if not names:
                self.found(Result(mutant, "untested"))
                continue
            order = self._affordable(sorted(names, key=lambda name: self._price(mutant, name)))
            tests = [(items[name], self.seconds + 10 * self.baseline.seconds[name]) for name in order]

            def work(mutant: Mutant = mutant, path: Path = path, tests: Any = tests) -> str:
                install(mutant, path, sources[path], live)
                return _first_failure(tests)

            yield Job((mutant, len(order)), work)

    def _price(self, mutant: Mutant, test: str) -> float:
        """Return the seconds that a test is likely to take for a kill: one that runs little else looks closer."""
        kills = (weight * self._kills[scope, test] for weight, scope in zip((10, 1), _scopes(mutant), strict=True))
        return (self.baseline.seconds[test] + 1e-3) * self._breadth[test] / (1 + sum(kills))

    def _affordable(self, order: Sequence[str]) -> list[str]:
        """Return the first tests, as many as the patience lasts, and one at least."""
        spent = accumulate(self.baseline.seconds[name] for name in order)
        return [name for i, (name, at) in enumerate(zip(order, spent, strict=True)) if i == 0 or at <= self.patience]

    def _path(self, mutant: Mutant) -> Path:
        return (self.root / mutant.path).resolve()

    @staticmethod
    def _result(ended: Ended) -> Result:
        mutant, tests = ended.name
        if ended.signal:
            return Result(mutant, "time" if ended.signal in _TIME_IS_UP else "crash", "", tests)
        return Result(mutant, "killed" if ended.result else "survived", ended.result, tests)

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _scopes(mutant: Mutant) -> tuple[str, str]:
    return f"{mutant.path}:{mutant.function}", mutant.path


def _first_failure(tests: Sequence[tuple[pytest.Item, float]]) -> str:
    """Run tests until one fails, each within its seconds, and return its name; empty where none does."""
    following = [*(item for item, _ in tests[1:]), None]
    for (item, seconds), after in zip(tests, following, strict=True):
        limit(seconds)
        if run(item, after).failed:
            return item.nodeid
    return ""
