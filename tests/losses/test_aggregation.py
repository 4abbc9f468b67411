"""Aggregations against plain loops, with sequences and groups of which nothing is trained; and what they refuse."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.errors import ConfigError, EmptyUnitError
from pullback.losses import AGGREGATIONS, CrossEntropy, TokenBatch, fixed_length
from pullback.losses.aggregation import Aggregation, Unit
from pullback.testing import Case
from pullback.testing.strategies import cases

NAMES = [name for name, known in AGGREGATIONS.items() if known.fits("token")]


def local(case: Case, name: str) -> list[float]:
    """The coefficient of the tokens of each sequence: one over what is trained of the sequence or the group, or 1 or 1/7."""
    trained = [len(s.trained()) for s in case.sequences]
    of_group = [
        sum(n for n, t in zip(trained, case.sequences, strict=True) if t.group == s.group) for s in case.sequences
    ]
    shared = {
        "sequence_mean_token_mean": trained,
        "group_mean_token_mean": of_group,
        "fixed_length": [7] * len(trained),
    }
    return [1 / max(n, 1) for n in shared.get(name, [1] * len(trained))]


def count(case: Case, name: str) -> float:
    """What a mean is divided by: units of which something is trained, 1 where there is none."""
    there = [s for s in case.sequences if s.trained()]
    counts = {
        "token_mean": sum(len(s.trained()) for s in there),
        "weighted_mean": math.fsum(w for s in there for w in s.weights),
        "group_mean_token_mean": len({s.group for s in there}),
        "sum": 1,
    }
    return counts.get(name, len(there)) or 1


@pytest.mark.parametrize("name", [*NAMES, "fixed_length"])
@given(case=cases(empty=True))
def test_means_are_plain_loops(name: str, case: Case) -> None:
    """Value and gradient of the cross-entropy: what is not trained neither counts nor makes a NaN."""
    aggregation = fixed_length(7) if name == "fixed_length" else AGGREGATIONS[name]
    rows = zip(case.sequences, local(case, name), strict=True)
    slopes = [-c * w / count(case, name) for s, c in rows for w in s.weights]
    logprobs = [x for s in case.sequences for x in s.logprobs]
    value = math.fsum(slope * x for slope, x in zip(slopes, logprobs, strict=True) if slope)
    batch, leaf = case.batch()
    loss = CrossEntropy(aggregation).evaluate(batch).loss
    assert loss.item() == pytest.approx(value, rel=1e-12, abs=1e-14)
    assert torch.autograd.grad(loss, leaf)[0].tolist() == pytest.approx(slopes, rel=1e-12, abs=0)


@pytest.mark.parametrize("unit", ["token", "sequence", "pair"])
def test_what_does_not_fit_is_refused_with_what_does(unit: Unit) -> None:
    """The error names all aggregations of that unit and no other; one of a constant length is for tokens."""
    fitting = {name for name, known in AGGREGATIONS.items() if known.fits(unit)}
    for name in AGGREGATIONS.keys() - fitting:
        with pytest.raises(ConfigError, match=f"one value per {unit} is aggregated by one of ") as caught:
            Aggregation.of(name, unit)
        listed = re.search("by one of (.*), got", str(caught.value))
        assert listed is not None
        assert set(listed[1].split(", ")) == fitting | ({"fixed_length(n)"} if unit == "token" else set())
    assert all(Aggregation.of(name, unit).fits(unit) for name in fitting)
    assert fixed_length(9).fits(unit) is (unit == "token")
    assert "sum" in fitting
    assert fitting != AGGREGATIONS.keys()


@pytest.mark.parametrize(
    ("weights", "refused"),
    [([1.0, -1.0], True), ([-1.0, 0.0], True), ([0.5, -1.0], True), ([1.0, -0.5], False), ([0.0, 0.0], False)],
)
def test_a_weighted_mean_needs_a_positive_sum(weights: list[float], refused: bool) -> None:
    """Of what is trained; with nothing trained the loss is 0. Other means take weights of any sign."""
    leaf = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch.from_packed(leaf, [2], weights=torch.tensor(weights, dtype=torch.float64))
    assert math.isfinite(CrossEntropy("token_mean").evaluate(batch).loss.item())
    if refused:
        with pytest.raises(EmptyUnitError, match=f"which is {sum(weights):g}; it must be positive"):
            CrossEntropy("weighted_mean").evaluate(batch)
        assert CrossEntropy("weighted_mean").undivided(batch).parts[0].count == sum(weights)
        return
    value = CrossEntropy("weighted_mean").evaluate(batch).loss.item()
    total = -sum(w * x for w, x in zip(weights, [-1.0, -2.0], strict=True))
    assert value == pytest.approx(total / (sum(weights) or 1.0))


@given(case=cases(), name=st.sampled_from(NAMES))
def test_a_total_is_at_least_that_of_the_call(case: Case, name: str) -> None:
    """Given the call's own count, rounded or not, the loss is what it is without; a smaller total is refused."""
    batch, _ = case.batch()
    loss = CrossEntropy(name)
    own = loss.counts([batch])
    if not own:
        return
    ((denominator, count),) = own.items()
    for total in (count, count * (1 - 5e-7)):
        found = loss.evaluate(batch, {denominator: total}).loss.item()
        assert found == pytest.approx(loss.evaluate(batch).loss.item(), rel=1e-6)
    assert loss.evaluate(batch, {denominator: 2 * count}).loss.item() == pytest.approx(found / 2, rel=1e-6)
    if denominator == "weight_sum":  # of mixed signs, a part may exceed the whole
        loss.evaluate(batch, {denominator: count / 2})
        return
    with pytest.raises(
        ConfigError, match=re.escape(f"counts['{denominator}'] is {count / 2:g}, but this call alone has")
    ):
        loss.evaluate(batch, {denominator: count / 2})


def test_either_half_of_an_aggregation_keeps_groups_whole() -> None:
    """A token's share of its group, or groups that are counted."""
    assert [name for name, known in AGGREGATIONS.items() if known.by_group] == ["group_mean_token_mean"]
    assert Aggregation("shares", "group", "tokens").by_group
    assert Aggregation("counts", "one", "groups").by_group
