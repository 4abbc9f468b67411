"""Summands: each is ``scale * sum_u c_u w_u value_u``, by a loop over its values, which are constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.losses import (
    AGGREGATIONS,
    Aggregation,
    PairTerm,
    Responses,
    SequenceTerm,
    Term,
    TokenBatch,
    TokenTerm,
    fixed_length,
)
from pullback.losses import functional as F
from pullback.losses.evaluation.terms import Summand

NAN = torch.nan
WEIGHTS = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
LOGPROBS = -torch.arange(1.0, 13.0, dtype=torch.float64).view(4, 3) / 7
FACTOR = torch.tensor([[0.5, 2.0, NAN], [1.5, NAN, NAN], [NAN, 0.25, 3.0], [1.0, 0.1, 4.0]], dtype=torch.float64)
GIVEN = torch.arange(12.0, dtype=torch.float64).view(4, 3) - 5
GROUPS = [0, 1, 0, 2]
TOKEN_WISE: dict[str, Callable[[Aggregation, Tensor], Summand]] = {
    "linear": lambda a, flat: TokenTerm("t", F.nll, (), a, 0.3),
    "with a factor": lambda a, flat: TokenTerm("t", F.nll, (), a, 0.3, factor=flat),
    "a closed form": lambda a, flat: TokenTerm("t", F.importance_sampling, (-1.0, torch.ones(())), a, 0.3),
    "another function": lambda a, flat: TokenTerm("t", torch.square, (), a, 0.3),
    "given": lambda a, flat: Term("t", GIVEN.reshape(flat.shape), "token", a, 0.3),
}
COUNTS = [2, 1, 2, 3]  # of trained tokens
COEFFICIENTS: dict[str, tuple[Aggregation, Sequence[float]]] = {
    "sum": (AGGREGATIONS["sum"], [1.0] * 4),
    "sequence": (AGGREGATIONS["sequence_mean_token_mean"], [1 / n for n in COUNTS]),
    "group": (AGGREGATIONS["group_mean_token_mean"], [1 / 4, 1 / 1, 1 / 4, 1 / 3]),
    "fixed": (fixed_length(5.0), [1 / 5] * 4),
}


def batch_of(packed: bool, **inputs: Any) -> TokenBatch:
    group_id = torch.tensor(GROUPS)
    if packed:
        flat = LOGPROBS.flatten()
        return TokenBatch.from_packed(flat, [3] * 4, weights=WEIGHTS.flatten(), group_id=group_id, **inputs)
    return TokenBatch.from_padded(LOGPROBS, WEIGHTS, group_id=group_id, **inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", TOKEN_WISE)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_terms_of_tokens(name: str, kind: str, packed: bool) -> None:
    aggregation, per_row = COEFFICIENTS[name]
    batch = batch_of(packed)
    term = TOKEN_WISE[kind](aggregation, FACTOR.reshape(batch.logprobs.shape))
    values = term.values(batch).view(4, 3)
    assert not values[WEIGHTS == 0].any() or kind == "given"
    expected = sum(0.3 * per_row[b] * WEIGHTS[b, j] * values[b, j] for b in range(4) for j in range(3) if WEIGHTS[b, j])
    assert term.numerator(batch).item() == pytest.approx(float(expected), rel=1e-12)
    if name == "sequence":  # of a part of a batch, whose tokens are told what theirs is
        own = (torch.arange(12.0, dtype=torch.float64) + 1).view(batch.logprobs.shape)
        expected = (0.3 * own.view(4, 3) * WEIGHTS * values).sum()
        assert term.numerator(batch, own).item() == pytest.approx(float(expected), rel=1e-12)


WHOLE: dict[str, Summand] = {
    "sequence": SequenceTerm("s", torch.square, "ref_logprobs", (), AGGREGATIONS["sequence_mean_token_sum"], 0.3),
    "pair": PairTerm("p", F.dpo, Responses("ref_logprobs"), (0.2,), AGGREGATIONS["pair_mean"], 0.3),
    "pair of means": PairTerm("p", F.simpo, Responses(mean=True), (), AGGREGATIONS["pair_mean"], 0.3),
    "given sequences": Term("s", GIVEN[:, 0], "sequence", AGGREGATIONS["sequence_mean_token_sum"], 0.3),
    "given pairs": Term("p", GIVEN[:2, 0], "pair", AGGREGATIONS["pair_mean"], 0.3),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", WHOLE)
def test_terms_of_sequences_and_pairs(kind: str, packed: bool) -> None:
    """They weigh their tokens themselves, and each counts once."""
    batch = batch_of(packed, ref_logprobs=(LOGPROBS.flip(0) if not packed else LOGPROBS.flip(0).flatten()))
    term = WHOLE[kind]
    expected = 0.3 * sum(term.values(batch).tolist())
    assert term.numerator(batch).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch itself
@pytest.mark.parametrize("kind", [*TOKEN_WISE, *WHOLE])
def test_values_are_constants(kind: str) -> None:
    """Backwards and forwards, whatever asks for a gradient."""
    leaf = LOGPROBS.clone().requires_grad_()
    batch = replace(batch_of(False), logprobs=leaf, ref_logprobs=leaf.flip(0))
    factor = FACTOR.clone().requires_grad_()
    term: Any = WHOLE[kind] if kind in WHOLE else TOKEN_WISE[kind](AGGREGATIONS["sum"], factor)
    if isinstance(term, Term):
        term = replace(term, unreduced=term.unreduced * leaf.sum())
    assert not term.values(batch).requires_grad
    with torch.autograd.forward_ad.dual_level():
        moving = torch.autograd.forward_ad.make_dual(LOGPROBS, torch.ones_like(LOGPROBS))
        values = term.values(batch_of(False, ref_logprobs=LOGPROBS).with_logprobs(moving))
        assert torch.autograd.forward_ad.unpack_dual(values).tangent is None
