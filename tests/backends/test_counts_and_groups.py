"""Totals of a step and prompt groups: what would be ignored, or would change with the cut into calls, is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers import distance, make_data, tiny_backend
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends import AdamParams
from pullback.datums import Datum
from pullback.errors import ConfigError, IncompleteUnitError, InvalidDatumsError
from pullback.losses import GRPO, CrossEntropy

LENGTHS = (5, 3, 7, 4, 6, 2)
DATA = make_data(list(LENGTHS))  # groups 0 0 1 1 2 2
TOKENS = sum(int((d.loss_fn_inputs["weights"].to_torch() != 0).sum()) for d in DATA)
MEAN = CrossEntropy("token_mean")
BY_GROUP = GRPO(aggregation="group_mean_token_mean")


@pytest.mark.parametrize(
    ("loss", "counts", "words"),
    [
        (CrossEntropy(), {"tokens": TOKENS}, "divided by nothing"),
        (CrossEntropy(), {"nonsense": 21}, "key of counts"),
        (MEAN, {"tokens": TOKENS, "pairs": 3}, "divided by tokens, but the totals given are of pairs, tokens"),
        (MEAN, {"tokens": math.inf}, "finite"),
        (MEAN, {"tokens": TOKENS - 1}, "this call alone has"),
        (
            MEAN,
            {"sequences": 6},
            "divided by tokens, but the totals given are of sequences: write counts={'tokens': ...}",
        ),
        (MEAN, [("tokens", 3)], "must map"),
    ],
)
def test_counts_that_cannot_be_meant(loss: CrossEntropy, counts: Any, words: str) -> None:
    """Each is refused in words, and nothing has accumulated."""
    backend = tiny_backend()
    with pytest.raises(ConfigError, match=words):
        backend.forward_backward(DATA, loss, counts=counts).result()
    assert backend.gradients() == {}


def test_contradicting_totals() -> None:
    """Calls of one loss in one step name one total; the next step may have another, and so may another loss."""
    backend = tiny_backend()
    backend.forward_backward(DATA[:2], MEAN, counts={"tokens": TOKENS}).result()
    with pytest.raises(ConfigError, match=f"an earlier call said {TOKENS}"):
        backend.forward_backward(DATA[2:], MEAN, counts={"tokens": TOKENS + 5}).result()
    backend.forward_backward(DATA[2:], GRPO(), counts={"tokens": TOKENS + 5}).result()
    backend.optim_step(AdamParams()).result()
    backend.forward_backward(DATA[2:], MEAN, counts={"tokens": TOKENS + 5}).result()


@given(st.permutations(range(3)), st.integers(1, 3))
def test_whole_groups_in_any_calls(order: list[int], calls: int) -> None:
    """One call or several, in any order: the same gradient."""
    whole, split = tiny_backend(), tiny_backend()
    whole.forward_backward(DATA, BY_GROUP).result()
    groups = [DATA[2 * g : 2 * g + 2] for g in order]
    for i in range(calls):
        part = [d for group in groups[i::calls] for d in group]
        split.forward_backward(part, BY_GROUP).result()
    assert distance(split.gradients(), whole.gradients()) < 1e-12


def test_a_group_cut_by_calls() -> None:
    """It is refused before any work; a new step may have the group again, and so may a loss that knows no groups."""
    backend = tiny_backend()
    backend.forward_backward([DATA[0], DATA[2]], BY_GROUP).result()
    with pytest.raises(IncompleteUnitError, match=r"groups \[0, 1\]"):
        backend.forward_backward([DATA[1], DATA[3]], BY_GROUP).result()
    backend.forward_backward([DATA[1], DATA[3]], GRPO(aggregation="token_mean"), counts={"tokens": TOKENS})
    backend.discard_gradients()
    backend.forward_backward([DATA[1], DATA[3]], BY_GROUP).result()


def test_groups_without_ids() -> None:
    """Otherwise each call would be one group."""
    bare = [Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k != "group_id"}) for d in DATA]
    with pytest.raises(InvalidDatumsError, match="missing required field 'group_id'"):
        tiny_backend().forward_backward(bare, BY_GROUP).result()
