"""Which datums stay in one micro-batch: each by itself, pairs, groups, or all of them."""

from __future__ import annotations

import pytest
from helpers import make_data
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends.calls.units import by_group, loss_units
from pullback.datums import Datum
from pullback.losses import DPO, GRPO, CrossEntropy
from pullback.losses.aggregation import Aggregation, Denominator, Local

IDS = st.lists(st.integers(0, 3), min_size=2, max_size=6)


def datums(ids: list[int], key: str) -> list[Datum]:
    bare = [
        Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in make_data([2] * len(ids))
    ]
    return [d.with_inputs(**{key: [i]}) for d, i in zip(bare, ids, strict=True)]


def together(ids: list[int]) -> list[list[int]]:
    """The places of equal numbers, in the order in which each comes first."""
    return [[i for i, other in enumerate(ids) if other == known] for known in dict.fromkeys(ids)]


@given(ids=IDS)
def test_units_are_what_the_kind_says(ids: list[int]) -> None:
    """Equal ids are together, however they are mixed; without pair ids neighbours are a pair."""
    each, whole = [[i] for i in range(len(ids))], [list(range(len(ids)))]
    grouped, paired = datums(ids, "group_id"), datums(ids, "pair_id")
    mean = GRPO(aggregation="group_mean_token_mean")
    for kind in ("constant", "token", "sequence"):
        assert loss_units(CrossEntropy(), kind, grouped) == each
        assert loss_units(mean, kind, grouped) == together(ids)
    assert loss_units(CrossEntropy(), "batch", grouped) == loss_units(mean, "batch", grouped) == whole
    assert loss_units(DPO(), "pair", paired) == together(ids)
    neighbours = datums(ids[: len(ids) // 2 * 2], "group_id")
    assert loss_units(DPO(), "pair", neighbours) == [[i, i + 1] for i in range(0, len(neighbours), 2)]


@pytest.mark.parametrize(
    ("local", "denominator", "grouped"),
    [("group", "tokens", True), ("one", "groups", True), ("group", "groups", True), ("one", "tokens", False)],
)
def test_either_mean_needs_whole_groups(local: Local, denominator: Denominator, grouped: bool) -> None:
    """One within each group, or one over them."""
    assert by_group(CrossEntropy(Aggregation("mine", local, denominator))) is grouped
