"""Pair terms: the summands of a loss that have one value per pair of a chosen and a rejected response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd import Function

from ..aggregation import Aggregation
from ..batch.selection import readable, transformed
from ..batch.sums import row_cotangent, scaled, scaled_total
from ..batch.token_batch import TokenBatch
from ..checks import require
from ..functional.closed_form import pair_form_of
from .terms import Summand, check_definition

__all__ = ["PairTerm", "Responses", "known_positive_weights", "numerators"]


class Responses(NamedTuple):
    """What a response is judged by: ``sum_t w_t (logprob_t - other_t)``, or that divided by ``sum_t w_t``.

    Args:
        relative_to: the field of the other log-probs, e.g. ``ref_logprobs``; None for 0.
        mean: whether to divide.
    """

    relative_to: str | None = None
    mean: bool = False

    def sides(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the numbers of the chosen and of the rejected responses; float64 [P], differentiable in the log-probs."""
        chosen, rejected = self.both(batch).unbind(1)
        return chosen, rejected

    def both(self, batch: TokenBatch) -> Tensor:
        """Return the `sides` together; [P, 2]."""
        rows = batch.weighted_row_sum(self.relative_to)
        rows = rows / _divisor(batch) if self.mean else rows
        return rows.view(-1, 2) if batch.neighbours_are_pairs else rows[torch.stack(batch.pairs, 1)]

    def slopes(self, batch: TokenBatch, of_sides: Tensor) -> Tensor:
        """Return the derivative by each sequence's sum, [B], from those by the numbers of both sides, [P, 2]."""
        if batch.neighbours_are_pairs:
            slopes = of_sides.view(-1)
        else:
            members = torch.stack(batch.pairs, 1)
            slopes = of_sides.new_zeros(batch.num_sequences).scatter_(0, members.view(-1), of_sides.view(-1))
        return slopes.div_(_divisor(batch)) if self.mean else slopes


@final
@dataclass(frozen=True, eq=False)
class PairTerm(Summand):
    """A summand with one value per pair, ``definition(chosen, rejected, *args)``.

    Args:
        name: e.g. ``dpo``.
        definition: a function of `pullback.losses.functional`, or any other pure one; elementwise in both sides.
        responses: what the two sides are.
        args: the definition's other arguments, numbers.
        aggregation: how the values are put together.
        scale: the summand's coefficient.
        where: of no effect: a pair counts whole.

    Raises:
        ConfigError: the definition is no function, the aggregation does not fit pairs, or the scale is no finite number.
    """

    name: str
    definition: Callable[..., Tensor]
    responses: Responses
    args: tuple[Any, ...]
    aggregation: Aggregation
    scale: float = 1.0
    where: Tensor | None = None

    def __post_init__(self) -> None:
        check_definition(self.definition)
        require(isinstance(self.responses, Responses), "responses of a term", "a Responses", self.responses)
        self._check("pair")

    def counting(self, where: Tensor | None) -> PairTerm:
        return replace(self, where=where)

    def values(self, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            return self.definition(*self.responses.sides(batch.detached()), *self.args)

    def numerator(self, batch: TokenBatch, coefficients: Tensor | None = None) -> Tensor:
        (total,) = _pair_sums(self.responses, (self,), batch)
        return total


def numerators(terms: Sequence[Summand], batch: TokenBatch) -> list[Tensor]:
    """Return the numerator of each summand; pair terms on the same numbers take one pass over the tokens."""
    alike: dict[Responses, list[PairTerm]] = {}
    for term in terms:
        if isinstance(term, PairTerm):
            alike.setdefault(term.responses, []).append(term)
    found: dict[int, Tensor] = {}
    for responses, group in alike.items():
        found.update(zip(map(id, group), _pair_sums(responses, group, batch), strict=True))
    return [found[id(term)] if id(term) in found else term.numerator(batch) for term in terms]


def known_positive_weights(batch: TokenBatch) -> bool:
    """Return whether the weights of every sequence are known to have a positive sum; nothing is read from a device for it."""

    def look() -> bool:
        return readable(batch.weight) and all(weight > 0 for weight in batch.weight_per_sequence.tolist())

    return batch.remember("every sequence has weight", look)


def _divisor(batch: TokenBatch) -> Tensor:
    weight = batch.weight_per_sequence
    return weight if known_positive_weights(batch) else torch.where(weight > 0, weight, 1.0)


def _pair_sums(responses: Responses, terms: Sequence[PairTerm], batch: TokenBatch) -> Sequence[Tensor]:
    """Return ``scale * sum_p definition(chosen_p, rejected_p, *args)`` of each term; 0-d, float64 or as the log-probs."""
    if transformed() or any(pair_form_of(term.definition) is None for term in terms):
        return _plain(responses, terms, batch)
    found: tuple[Tensor, ...] = _PairSums.apply(batch.logprobs, responses, terms, batch)  # type: ignore[no-untyped-call]
    return found


def _plain(responses: Responses, terms: Sequence[PairTerm], batch: TokenBatch) -> list[Tensor]:
    sides = responses.sides(batch)
    return [scaled(term.definition(*sides, *term.args).sum(), term.scale) for term in terms]


@final
class _PairSums(Function):
    """`_pair_sums` from closed forms: keeps one slope per response, and no log-prob."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, responses: Responses, terms: Sequence[PairTerm], batch: TokenBatch
    ) -> tuple[Tensor, ...]:
        sides = responses.both(batch)
        totals: list[Tensor] = []
        slopes: list[Tensor] = []
        for term in terms:
            closed = pair_form_of(term.definition)
            assert closed is not None
            value, slope = closed(sides, *term.args)
            totals.append(scaled_total(value.sum(), term.scale, x.dtype))
            slopes.append(slope)
        ctx.save_for_backward(*slopes)
        ctx.rest = responses, terms, batch
        return tuple(totals)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        responses, terms, batch = ctx.rest
        if torch.is_grad_enabled():  # a second derivative is wanted: that of the definitions themselves
            totals = _plain(responses, terms, batch)
            return torch.autograd.grad(totals, batch.logprobs, gradients, create_graph=True)[0], None, None, None
        coefficients = [scaled(g, term.scale) for g, term in zip(gradients, terms, strict=True)]
        per_row = responses.slopes(batch, _dot(coefficients, ctx.saved_tensors))
        return row_cotangent(per_row, batch.mask, batch.scale, batch.layout, batch.logprobs.dtype), None, None, None


def _dot(coefficients: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    total = slopes[0] * coefficients[0]
    for slope, coefficient in zip(slopes[1:], coefficients[1:], strict=True):
        total.addcmul_(slope, coefficient)
    return total
