"""From a loss's terms to its value, parts, problems and metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch.adapt import batch_field
from ..batch.problems import Problem, raise_readable
from ..batch.remembered import written_into
from ..batch.selection import wide
from ..batch.token_batch import TokenBatch
from ..batch.values import examine, sound, wrong_values
from ..counts import (
    Counts,
    below_own,
    check_counts,
    count_units,
    denominators_of,
    divisor,
    given_count,
    own_total,
    require_counts,
)
from .metrics import DeferredMetric, Metric, read, total
from .output import LossOutput, Part
from .pair_terms import numerators
from .terms import Summand

__all__ = ["Evaluable", "assemble", "fields_of", "part_of", "put_together"]

_logger: Final = logging.getLogger(__name__)


class Evaluable(Protocol):
    """What an evaluation asks of a loss; see `Loss`."""

    @property
    def name(self) -> str: ...
    @property
    def required_inputs(self) -> tuple[str, ...]: ...
    @property
    def optional_inputs(self) -> tuple[str, ...]: ...
    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]: ...
    def problems(self, batch: TokenBatch) -> Iterable[Problem | None]: ...
    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric | Metric]: ...
    def evaluate(self, batch: TokenBatch, counts: Counts | None = None) -> LossOutput: ...
    def batch(self, data: Sequence[Any], logprobs: Sequence[Tensor]) -> TokenBatch: ...


def assemble(
    loss: Evaluable, batch: TokenBatch, terms: tuple[Summand, ...], counts: Counts | None, *, divided: bool = True
) -> LossOutput:
    """Reduce the terms of a loss and put them together; see `Loss.evaluate` and `Loss.undivided`."""
    if not isinstance(terms, tuple | list) or not all(isinstance(term, Summand) for term in terms):
        raise ConfigError(
            f"terms of {loss.name} must return a tuple of Term, TokenTerm, PairTerm or SequenceTerm, got {type(terms).__name__}"
        )
    check_counts(counts)
    require_counts(loss.name, denominators_of(terms), counts)
    parts: list[Part] = []
    sums = numerators(terms, batch)
    found: list[Problem | None] = [*batch.problems(), *loss.problems(batch)]
    for term, numerator in zip(terms, sums, strict=True):
        part, problem = part_of(term, numerator, batch, counts, divided=divided)
        parts.append(part)
        found.append(problem)
    output = put_together(loss, batch, lambda: terms, tuple(parts), raise_readable(found))
    fields = fields_of(loss)
    if not sound(batch, output.loss, fields):
        examine(batch, fields)
    return output


def put_together(
    loss: Evaluable,
    batch: TokenBatch,
    terms: Callable[[], tuple[Summand, ...]],
    parts: tuple[Part, ...],
    problems: tuple[Problem, ...] = (),
) -> LossOutput:
    """Divide the parts and add them up; metrics and values wait until they are read, and the terms for the values."""
    value, dtype = _divided(parts), wide(batch.logprobs).dtype
    value = value if value.dtype == dtype else value.to(dtype)
    if problems:
        value = torch.where(torch.stack([p.present for p in problems]).any(), math.nan, value)
    return LossOutput(
        value,
        parts,
        problems,
        lambda: {term.name: term.values(batch) for term in terms()},
        partial(_metrics, loss, batch, parts, terms),
        lambda: wrong_values(batch, fields_of(loss)),
    )


def _divided(parts: tuple[Part, ...]) -> Tensor:
    """Return the sum of the parts, each divided by its count; once, where that is the same."""
    first, *others = parts
    if all(part.divides_as(first) for part in others):
        total = sum((part.numerator for part in others), first.numerator)
        return total if first.denominator == "none" else total / divisor(first.count)
    shares = [part.numerator / divisor(part.count) for part in parts]
    return sum(shares[1:], shares[0])


def part_of(
    term: Summand, numerator: Tensor, batch: TokenBatch, counts: Counts | None, *, divided: bool
) -> tuple[Part, Problem | None]:
    """Return a term's numerator with what it is divided by, and what may be wrong with that."""
    denominator = term.aggregation.denominator
    if denominator == "none":
        return Part(term.name, numerator, denominator, 1.0), None
    own = count_units(batch, denominator, term.where)
    if counts is None:
        return Part(term.name, numerator, denominator, own), own_total(term, batch, own) if divided else None
    given = given_count(term, counts)
    return Part(term.name, numerator, denominator, given, own), below_own(term, given, own)


def fields_of(loss: Evaluable) -> tuple[str, ...]:
    """Return the fields of a batch that a loss reads, beside the log-probs."""
    return tuple(batch_field(key) for key in (*loss.required_inputs, *loss.optional_inputs))


@torch.no_grad()
def _metrics(
    loss: Evaluable, batch: TokenBatch, parts: tuple[Part, ...], terms: Callable[[], tuple[Summand, ...]]
) -> dict[str, Metric]:
    try:
        batch = batch.detached()
        sums = _unwritten(parts, batch, terms)
        value = sum(sums[1:], sums[0])
        common: dict[str, DeferredMetric | Metric] = {"loss": total(value)}
        common |= _per_unit(parts, sums, value)
        common["tokens"] = total(count_units(batch, "tokens"))
        common["sequences"] = total(float(batch.num_sequences))
        return read(common | dict(loss.describe(batch)))
    except Exception:
        # A metric must never cost a training step (nor hide that it is missing).
        _logger.exception("metrics of %s could not be computed", loss.name)
        return {"metrics_failed": Metric(1.0, 1.0, "sum")}


def _unwritten(parts: tuple[Part, ...], batch: TokenBatch, terms: Callable[[], tuple[Summand, ...]]) -> list[Tensor]:
    """Return the numerators, detached; a sum of one term is its numerator, so `loss /= 4` has them computed again."""
    found = [part.numerator.detach() for part in parts]
    return numerators(terms(), batch) if any(map(written_into, found)) else found


def _per_unit(parts: tuple[Part, ...], numerators: list[Tensor], value: Tensor) -> dict[str, DeferredMetric]:
    """Return the loss per unit of the batch itself, so that calls and micro-batches combine; by term where they differ."""
    own = [part.count if part.own is None else part.own for part in parts]
    if any(part.denominator == "none" for part in parts):
        return {}
    if all(part.divides_as(parts[0]) for part in parts):
        return {"loss_per_unit": DeferredMetric(value, own[0], "mean")}
    return {
        f"{p.name}_per_unit": DeferredMetric(n, count, "mean")
        for p, n, count in zip(parts, numerators, own, strict=True)
    }
