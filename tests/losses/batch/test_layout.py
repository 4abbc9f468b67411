"""Lengths of packed sequences: they add up to the tokens, or are refused, at once or where they cannot be looked at later."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pullback.errors import LengthError
from pullback.losses import TokenBatch

TOKENS = torch.full((6,), -1.0)
WRONG = ([2, 3], [2, 5], [7, -1], [], [-6])
RIGHT = ([2, 4], [0, 6, 0], [6], [1] * 6)


class Elsewhere(Tensor):
    """A tensor that a loss does not look at, as one on a device."""


@pytest.mark.parametrize("lengths", WRONG)
def test_lengths_that_do_not_add_up(lengths: list[int]) -> None:
    for given in (lengths, torch.tensor(lengths, dtype=torch.int64)):
        with pytest.raises(LengthError, match=r"lengths must add up to the 6 tokens of logprobs, got \[.*\]$"):
            TokenBatch.from_packed(TOKENS, given)


@pytest.mark.parametrize("lengths", [[0, 3, 5], [-1, 6], [0, 6, 3, 6], [3, 6]])
def test_lengths_that_are_not_cumulative_either(lengths: list[int]) -> None:
    """Their differences would be no lengths."""
    with pytest.raises(LengthError, match=r"\]$"):
        TokenBatch.from_packed(TOKENS, lengths)


@pytest.mark.parametrize(("lengths", "wrong"), [*((x, True) for x in WRONG), *((x, False) for x in RIGHT)])
def test_lengths_that_are_looked_at_later(lengths: list[int], wrong: bool) -> None:
    elsewhere = torch.tensor(lengths, dtype=torch.int64).as_subclass(Elsewhere)
    (problem,) = TokenBatch.from_packed(TOKENS, elsewhere).problems()
    assert bool(problem.present) is wrong
    assert isinstance(problem.error(), LengthError)


def test_lengths_that_have_been_looked_at() -> None:
    assert TokenBatch.from_packed(TOKENS, [2, 4]).problems() == []
