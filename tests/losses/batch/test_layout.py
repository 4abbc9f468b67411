"""Lengths of packed sequences add up to the tokens, or are refused, at once or later; and sums of many tokens are precise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pullback.errors import LengthError
from pullback.losses import TokenBatch
from pullback.losses.batch.layout import Packed, accurate_sum, count_of, count_trained

TOKENS = torch.full((6,), -1.0)
WRONG: tuple[list[int], ...] = ([2, 3], [2, 5], [7, -1], [], [-6])
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


def test_sums_of_packed_candidates() -> None:
    """Of each row, its tokens' candidates together; whether or not a gradient is wanted, or the sums can be looked at."""
    values = torch.arange(15.0).view(5, 3)
    layout = Packed(values.shape, torch.tensor([0, 2, 2, 5]))
    expected = [15.0, 0.0, 90.0]
    for given in (values, values.clone().requires_grad_(), values.as_subclass(Elsewhere)):
        assert layout.row_sums(given).tolist() == expected


MANY = 16 * 1024  # from here on, numbers are added in strips


@pytest.mark.parametrize("count", [3, 1024, MANY - 1, MANY, MANY + 1, 3 * MANY])
def test_sums_of_many_numbers(count: int) -> None:
    """In fp32 they are as precise as promised, and in fp64 exact; in memory side by side or not."""
    numbers = -torch.rand(count, generator=torch.Generator().manual_seed(count)).log1p() - 0.1
    exact = numbers.double().sum()
    for values in (numbers, torch.stack([numbers, numbers], 1)[:, 0], numbers.double()):
        total = accurate_sum(values)
        assert total.dtype == torch.float64
        assert total.item() == pytest.approx(exact.item(), rel=1e-8)
    assert accurate_sum(torch.full((count,), 0.1)).item() == pytest.approx(count * 0.1, rel=4e-7)


@pytest.mark.parametrize("count", [3, MANY, MANY + 1])
def test_counts_of_many_tokens(count: int) -> None:
    """Of weights or of ones and zeros alike."""
    weights = torch.arange(count) % 3 - 1.0
    trained = (weights != 0).float()
    expected = float(count - len(range(1, count, 3)))
    for found in (count_of(trained), count_trained(weights, lambda: trained), count_trained(None, lambda: trained)):
        assert found.dtype == torch.float64
        assert found.item() == expected


def test_counts_that_fp32_does_not_hold() -> None:
    ones = torch.ones(()).expand(2**24 + 1)
    assert ones.sum().item() < 2**24 + 1
    assert count_of(ones).item() == 2**24 + 1
