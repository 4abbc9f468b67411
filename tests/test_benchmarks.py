"""What the benchmarks print is what was measured."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

if not (Path(__file__).parent.parent / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)

from benchmarks.timing import Times


@pytest.mark.parametrize("rounds", [[3.0], [1.0, 2.0], [5.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0, 9.0]])
def test_percentiles_stay_within_the_rounds(rounds: list[float]) -> None:
    """No percentile lies beyond the fastest or slowest round, the fifth is the median, and they are in order."""
    times = Times({"work": rounds}, {"work": [0.0] * len(rounds)})
    found = [times.quantile("work", q) for q in range(1, 10)]
    assert found == sorted(found)
    assert min(rounds) <= found[0]
    assert found[-1] <= max(rounds)
    assert found[4] == pytest.approx(statistics.median(rounds))


def test_extrapolated_percentiles_are_noticed() -> None:
    """Negative control: quantiles of a population that three rounds are only a sample of go beyond the rounds."""
    assert statistics.quantiles([1.0, 2.0, 5.0], n=10)[7] > 5.0
