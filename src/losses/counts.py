"""Counts: what a mean is divided by, of a batch, or of a whole step before any forward."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, EmptyUnitError
from .aggregation import Denominator
from .batch.problems import Problem
from .batch.selection import readable
from .batch.token_batch import TokenBatch
from .checks import choice, number
from .evaluation.terms import Summand

__all__ = [
    "Count",
    "Counts",
    "add_counts",
    "below_own",
    "check_counts",
    "count_units",
    "denominators_of",
    "divisor",
    "given_count",
    "not_positive",
    "own_total",
    "require_counts",
]

Count = Tensor | float
Counts = Mapping[str, float | Tensor]
_MISSING: Final = (
    "counts[{0!r}] is None: the trainer has not counted. Without the total of the whole optimizer step, each micro-batch would "
    "divide by its own count. Pass that total, over all micro-batches and ranks: num_items_in_batch of transformers' Trainer "
    "(which counts if the batches have labels), config.global_batch_info['batch_num_tokens'] of verl, global_valid_tokens of "
    "torchtitan; elsewhere loss.counts(micro_batches), summed over the ranks"
)


def count_units(batch: TokenBatch, denominator: Denominator, where: Tensor | None = None) -> Count:
    """Return how many of what ``denominator`` names are in ``batch``: float64, 0-d, or a float where shapes tell.

    Args:
        batch: the tensors.
        denominator: what is counted.
        where: bool, one per token; the tokens that count, if not all trained ones.
    """
    if where is not None:
        return _count(batch, denominator, _restricted(batch, where))
    return batch.remember(f"count of {denominator}", lambda: _count(batch, denominator, None))


def divisor(count: Count) -> Count:
    """Return what to divide by: the count, or 1 where it is 0, so that an empty loss is 0 and stays connected."""
    if not isinstance(count, Tensor):
        return count or 1.0
    if readable(count):
        return count.item() or 1.0
    return torch.where(count == 0, torch.ones_like(count), count)


def own_total(term: Summand, batch: TokenBatch, count: Count) -> Problem | None:
    """Return the problem of a weighted mean whose weights have no positive sum, though something is trained."""
    if term.aggregation.denominator != "weight_sum" or not isinstance(count, Tensor):
        return None
    return Problem((count <= 0) & (batch.token_count > 0), lambda: not_positive(float(count)))


def not_positive(total: float) -> EmptyUnitError:
    """Return the error of a weighted mean by a total that is not positive."""
    return EmptyUnitError(f"weighted_mean divides by the sum of the weights, which is {total:g}; it must be positive")


def given_count(term: Summand, counts: Counts) -> Count:
    """Return the total that the caller gave for a term's denominator; 1 where nothing is divided."""
    denominator = term.aggregation.denominator
    return 1.0 if denominator == "none" else counts[denominator]


def below_own(term: Summand, count: Count, own: Count) -> Problem | None:
    """Return the problem of a given total that is below what the call alone has."""
    name = term.aggregation.denominator
    if name == "weight_sum":  # of mixed signs, a part may exceed the whole
        return None
    # Compared as they are: to bring a number over to a device waits for the device.
    below = own > count * (1 + 1e-6)
    return Problem(
        below if isinstance(below, Tensor) else torch.as_tensor(below, device="cpu"),
        lambda: ConfigError(
            f"counts[{name!r}] is {float(count):g}, but this call alone has {float(own):g}: give the total of the whole step"
        ),
    )


def check_counts(counts: object) -> None:
    """Check totals that the caller gave, each by itself.

    Args:
        counts: should map denominators to positive numbers; None: nothing was given.

    Raises:
        ConfigError: it is something else.
    """
    if counts is None:
        return
    if not isinstance(counts, Mapping):
        raise ConfigError(f"counts must map denominators to totals, e.g. {{'tokens': 18231}}, got {counts!r}")
    for name, total in counts.items():
        choice("a key of counts", name, [d for d in get_args(Denominator) if d != "none"])
        if total is None:
            raise ConfigError(_MISSING.format(name))
        if not isinstance(total, Tensor):
            number(f"counts[{name!r}]", total, low=0.0)
        elif total.numel() != 1:
            raise ConfigError(f"counts[{name!r}] must be one number, got shape {tuple(total.shape)}")
        elif readable(total):
            number(f"counts[{name!r}]", total.item(), low=0.0)


def denominators_of(terms: Iterable[Summand]) -> set[str]:
    """Return what the terms of a loss are divided by."""
    names: set[str] = {term.aggregation.denominator for term in terms}
    return names - {"none"}


def require_counts(
    name: str,
    denominators: Collection[str],
    counts: Counts | None,
    argument: Literal["counts", "with_counts"] = "counts",
    *,
    all_known: bool = True,
) -> None:
    """Check that totals are those that a loss is divided by.

    Args:
        name: the loss's.
        denominators: what it is divided by.
        counts: what was given; None: nothing, and each call divides by its own count.
        argument: how the totals are given.
        all_known: whether it is divided by nothing else.

    Raises:
        ConfigError: a total is missing, or would be ignored.
    """
    if counts is None or not (set(denominators) - set(counts) or (all_known and set(counts) - set(denominators))):
        return
    needed = sorted(denominators)
    if argument == "counts":
        call = f"counts={{{', '.join(f'{each!r}: ...' for each in needed)}}}"
    else:
        call = f"with_counts({', '.join(f'{each}=...' for each in needed)})"
    divides, given = (", ".join(sorted(names)) or "nothing" for names in (denominators, counts))
    remedy = (
        f"write {call} with the total of the whole step, as loss.counts gives it"
        if needed
        else f"it is a sum, so write {call}, or give the loss an aggregation that is a mean"
    )
    raise ConfigError(f"{name} is divided by {divides}, but the totals given are of {given}: {remedy}")


def add_counts(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of several counts, by denominator."""
    totals: dict[str, float] = {}
    for part in parts:
        for name, count in part.items():
            totals[name] = totals.get(name, 0.0) + count
    return totals


def _restricted(batch: TokenBatch, where: Tensor) -> Tensor:
    of_targets = batch.layout.candidates and where.dim() == len(batch.layout.shape)
    at = where.any(-1) if of_targets else where
    return torch.where(at, batch.indicator(), torch.zeros((), dtype=batch.weight.dtype, device=at.device))


def _count(batch: TokenBatch, denominator: Denominator, indicator: Tensor | None) -> Count:
    if denominator == "none":
        return 1.0
    if denominator == "all_sequences":
        return float(batch.num_sequences)
    if denominator == "pairs":
        return float(batch.num_sequences // 2 if batch.neighbours_are_pairs else batch.pairs.chosen.shape[0])
    if denominator == "tokens":
        return batch.token_count if indicator is None else indicator.sum(dtype=torch.float64)
    if denominator == "weight_sum":
        weight = batch.weight
        if indicator is not None:
            weight = weight * (indicator[..., None] if batch.layout.candidates else indicator)
        return weight.sum(dtype=torch.float64)
    tokens = batch.tokens_per_sequence if indicator is None else batch.layout.row_sums(indicator)
    if denominator == "groups":
        tokens = torch.zeros_like(tokens).index_add(0, batch.groups.index, tokens)
    return (tokens > 0).sum().double()
