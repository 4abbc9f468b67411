"""Clients that ask one service for work at the same time, and what they waited for it."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

__all__ = ["Measured", "at_once", "probing", "resident", "timed"]

Work = Callable[[], object]


@final
@dataclass(frozen=True)
class Measured:
    """Pieces of work that have been done.

    Attributes:
        seconds: from the first beginning to the last end.
        latencies: seconds of each piece.
    """

    seconds: float
    latencies: Sequence[float]

    @property
    def rate(self) -> float:
        """Pieces a second."""
        return len(self.latencies) / self.seconds

    def quantile(self, percent: int) -> float:
        """Return a percentile of the latencies, interpolated between them: never beyond the shortest or the longest."""
        if len(self.latencies) < 2:
            return self.latencies[0]
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


def timed(work: Work) -> float:
    """Return the seconds that a piece of work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def at_once(works: Sequence[Work], times: int) -> Measured:
    """Repeat each work in a thread of its own; all begin together."""
    gate = threading.Barrier(len(works) + 1)

    def repeated(work: Work) -> list[float]:
        gate.wait()
        return [timed(work) for _ in range(times)]

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(repeated, work) for work in works]
        gate.wait()
        began = time.perf_counter()
        latencies = [seconds for future in futures for seconds in future.result()]
        return Measured(time.perf_counter() - began, latencies)


@contextmanager
def probing(url: str, key: str) -> Iterator[list[float]]:
    """Ask for ``healthz`` again and again from a process of its own; at the end the list holds the seconds of each answer."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.serving.probe", url, key]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    latencies: list[float] = []
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        try:
            yield latencies
        finally:
            with contextlib.suppress(BrokenPipeError):
                latencies += json.loads(process.communicate()[0] or "[]")


def resident(pid: int) -> int:
    """Return the bytes of a process that are in memory; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
