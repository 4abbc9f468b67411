"""What the benchmarks print is what was measured."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if not (Path(__file__).parent.parent / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)

from benchmarks.loss_functions import losses, peers
from benchmarks.loss_functions.hand_written import Inputs, MaskKind
from benchmarks.loss_functions.works import HAND, ROWS, works
from benchmarks.timing import Times, interleave


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


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=9))
def test_differences_are_paired(rounds: list[tuple[float, float]]) -> None:
    """The median difference is that of a round's two works, and changes its sign with their order."""
    ours, baseline = ([r[i] for r in rounds] for i in (0, 1))
    times = Times({"ours": ours, "baseline": baseline}, {})
    found = times.difference("ours", "baseline")
    assert min(a - b for a, b in rounds) <= found <= max(a - b for a, b in rounds)
    assert times.difference("baseline", "ours") == pytest.approx(-found)


def test_a_threads_clock_does_not_wait() -> None:
    """A work that sleeps takes next to nothing of its thread's time, and what others do is not looked at."""
    times = interleave({"sleep": lambda: time.sleep(0.01)}, 1, "thread")
    assert 0.0 <= times.quantile("sleep", 5) < 0.005
    assert math.isnan(times.others["sleep"][0])


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(["contiguous", "random"]))
def test_every_sequence_of_the_inputs_is_trained(sequences: int, width: int, kind: MaskKind) -> None:
    """A mask has a trained token in each sequence, and a contiguous one has no gap."""
    mask = Inputs.draw(sequences, width, kind).mask
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert bool((mask.sum(1) >= 1).all())
    if kind == "contiguous":
        padded = torch.nn.functional.pad(mask, (1, 1))
        assert bool((padded.diff().abs().sum(1) == 2).all())


def test_losses_agree_and_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Every loss, in every form, has the value and gradient of the hand-written one; the last line is the document."""
    losses.run(argparse.Namespace(sizes="4x8", rounds=1, only=[], compiled=False, peers=False))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["case"] for case in document["cases"]] == ["4x8 contiguous", "4x8 random"]
    for case in document["cases"]:
        assert set(case["rows"]) == set(ROWS)
        for row in case["rows"].values():
            assert row["hand_ms"] > 0
            assert {"float mask", "bool mask", "packed", "metrics read"} <= set(row)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("wrong", [lambda x: x + 1e-3, lambda x: x * (1 + 1e-3)], ids=["value", "gradient"])
def test_another_loss_is_noticed(name: str, wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Negative control: a hand-written loss that is a thousandth off is not taken for the same one."""
    inputs = Inputs.draw(4, 8, "contiguous")
    exact = ROWS[name].exact or ROWS[name].hand
    row = dataclasses.replace(ROWS[name], exact=lambda x, given: wrong(exact(x, given)))
    columns, _ = works(row, inputs, with_compiled=False)
    with pytest.raises(AssertionError, match=f"^{name.replace('+', '.')}, float mask: loss off by"):
        losses.check(name, row, inputs, columns)


@pytest.mark.parametrize(("limit", "met"), [(0.6, True), (0.5, True), (0.4, False)])
def test_a_target_is_met_up_to_its_limit(limit: float, met: bool) -> None:
    """A ratio of exactly one half meets a target of one half; packed is held against the padded float mask."""
    times = Times({HAND: [2.0, 4.0], "float mask": [1.0, 2.0], "packed": [1.0, 2.0]}, {})
    found = losses.figures(times, {"float mask": limit, "packed": 2 * limit}, None)
    assert found["float mask"]["ratio"] == 0.5
    assert found["packed"]["ratio"] == 1.0
    assert found["float mask"]["met"] is found["packed"]["met"] is met
    assert ("met" if met else "missed") in losses.cell(found["float mask"])


def test_short_losses_are_held_to_microseconds() -> None:
    """Where no ratio is asked for, the difference to the hand-written loss counts."""
    times = Times({HAND: [50e-6], "float mask": [150e-6], "bool mask": [170e-6], "metrics read": [1.0]}, {})
    found = losses.figures(times, {}, 110.0)
    assert (found["float mask"]["met"], found["bool mask"]["met"]) == (True, False)
    assert "met" not in found["metrics read"]


def test_a_loss_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other columns stand, and the reason is the first line of what the compiler raised."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # would load the compiler
    columns, reason = works(ROWS["DPO"], Inputs.draw(4, 8, "random"), with_compiled=True)
    assert "compiled" not in columns
    assert reason == "RuntimeError: no compiler"


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the other libraries there is no function of theirs, and the command that installs each is shown."""
    for name in ("tensordict", "torchrl", "trl", "verl"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not peers.available()
    out = capsys.readouterr().out
    assert all(command in out for command in ("pip install torchrl", ".[peers]", "--no-deps verl"))


def test_pairs_are_put_in_halves() -> None:
    """Neighbours become all chosen sequences, then all rejected ones."""
    assert peers.chosen_first(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]
