"""Interleaved timing, peak memory, and reports: a table for people, one JSON line at the end."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["Clock", "Report", "Times", "environment", "interleave", "peak_bytes", "taken"]

Work = Callable[[], object]
Clock = Literal["wall", "cpu", "thread"]


@dataclass
class Times:
    """Seconds of every round, by name; rounds are paired: entry i of all names ran one after another.

    Attributes:
        seconds: by name.
        others: share of the machine's cores that other processes took meanwhile, by name; NaN with the clock ``thread``.
    """

    seconds: dict[str, list[float]]
    others: dict[str, list[float]]

    def quantile(self, name: str, q: int) -> float:
        """The 10 q-th percentile, interpolated between the rounds: never below the fastest or above the slowest of them."""
        found = self.seconds[name]
        return statistics.quantiles(found, n=10, method="inclusive")[q - 1] if len(found) > 1 else found[0]

    def ratio(self, name: str, baseline: str) -> float:
        """Median of the paired ratios."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[baseline], strict=True))

    def difference(self, name: str, baseline: str) -> float:
        """Median of the paired differences, seconds."""
        return statistics.median(a - b for a, b in zip(self.seconds[name], self.seconds[baseline], strict=True))


def interleave(works: Mapping[str, Work], rounds: int, clock: Clock = "wall") -> Times:
    """Time works in random order, round after round; one round before does not count.

    Args:
        works: by name.
        rounds: that count.
        clock: ``cpu`` counts this process's CPU time; with one thread it is what an idle machine would take.
            ``thread`` counts the calling thread's CPU time: for works of some microseconds on one thread of a CPU.
    """
    times = Times({name: [] for name in works}, {name: [] for name in works})
    order = random.Random(
        0
    )  # a work finds the caches as the one before it left them: it must not always be the same one
    for round_ in range(rounds + 1):
        for name in order.sample(list(works), len(works)):
            seconds, others = taken(works[name], clock)
            if round_:
                times.seconds[name].append(seconds)
                times.others[name].append(others)
    return times


def taken(work: Work, clock: Clock) -> tuple[float, float]:
    """Return the seconds, and the share of all cores that others took."""
    if clock == "thread":
        began = time.thread_time()
        work()
        return time.thread_time() - began, math.nan  # looking at other processes would empty the caches of a short work
    _synchronize()
    busy, own, began = _busy_seconds(), time.process_time(), time.perf_counter()
    work()
    _synchronize()
    wall, cpu = time.perf_counter() - began, time.process_time() - own
    others = max(0.0, _busy_seconds() - busy - cpu) / (wall * (os.cpu_count() or 1))
    return cpu if clock == "cpu" else wall, others


def _busy_seconds() -> float:
    """CPU time of all processes since the start; 0 where the system does not say."""
    try:
        fields = [float(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # neither idle nor waiting


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(work: Work) -> int | None:
    """Largest memory of a work beyond what was there before; None where the system does not say."""
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the system, so that it counts again
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def environment() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    versions = {}
    for name in (
        "pullback",
        "torch",
        "transformers",
        "peft",
        "trl",
        "torchrl",
        "verl",
        "liger-kernel",
        "cut-cross-entropy",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


@dataclass
class Report:
    """Collects cases, prints each as a table, and everything as one JSON line.

    Args:
        what: name of the benchmark.
    """

    what: str
    cases: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        case: str,
        times: Times,
        baseline: str,
        facts: Mapping[str, Any] | None = None,
        peaks: Mapping[str, int | None] | None = None,
    ) -> None:
        """Print one case; ratios are against ``baseline``."""
        facts = facts or {}
        print(f"\n{case}  " + "  ".join(f"{k}={v}" for k, v in facts.items()))
        print(f"  {'':34}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'ratio':>8}{'peak MB':>10}{'others':>8}")
        rows = {}
        for name in times.seconds:
            low, middle, high = (1e3 * times.quantile(name, q) for q in (2, 5, 8))
            peak = (peaks or {}).get(name)
            ratio = times.ratio(name, baseline)
            shown = "" if peak is None else f"{peak / 1e6:10.0f}"
            others = statistics.median(times.others[name])
            print(f"  {name:34}{low:10.1f}{middle:10.1f}{high:10.1f}{ratio:8.2f}{shown:>10}{others:8.0%}")
            rows[name] = {"p20": low, "p50": middle, "p80": high, "ratio": ratio, "peak_bytes": peak, "others": others}
        sys.stdout.flush()  # a long benchmark is read while it runs
        self.cases.append({"case": case, "baseline": baseline, **facts, "rows": rows})

    def close(self) -> None:
        """Print the JSON line."""
        print(f"\nratios are medians of paired rounds; the first named row of ratio 1.00 is the baseline: {self.what}")
        print(json.dumps({"benchmark": self.what, "environment": environment(), "cases": self.cases}))
