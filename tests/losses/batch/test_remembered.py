"""What a batch has computed already is taken again only while it is true, and holds no graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pullback.losses import TokenBatch


def test_inputs_that_are_written_over_are_looked_at_again() -> None:
    weights = torch.ones(4)
    batch = TokenBatch.from_packed(-torch.ones(4), [4], weights=weights)
    assert batch.token_count.item() == 4
    known = batch.token_count
    batch.refresh()
    assert batch.token_count is known
    weights[0] = 0.0
    batch.refresh()
    assert batch.token_count.item() == 3
    known = batch.token_count
    batch.refresh()
    assert batch.token_count is known


SUMS: dict[str, Callable[[TokenBatch], Tensor]] = {
    "rows": TokenBatch.weighted_row_sum,
    "tokens": TokenBatch.negative_log_likelihood,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_without_a_graph_are_those_with_one(name: str) -> None:
    """Metrics take what a loss has summed, without its graph; with a graph, the sum is taken again."""
    logprobs = (-torch.arange(4.0)).requires_grad_()
    batch = TokenBatch.from_packed(logprobs, [1, 3])
    first = SUMS[name](batch)
    kept = SUMS[name](batch.detached())
    assert torch.equal(kept, first)
    assert not kept.requires_grad
    assert SUMS[name](batch.detached()) is kept
    assert SUMS[name](batch).requires_grad
