"""Ratios of whole sequences: the geometric mean over their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import DatumError, EmptyUnitError, LengthError, MissingFieldError
from ..batch.problems import Problem
from ..batch.selection import select, wide
from ..batch.sums import row_sum
from ..batch.token_batch import TokenBatch
from ..evaluation.metrics import DeferredMetric, maximum, mean
from ..functional.numerics import bounded_exp
from .clip import ClipRange
from .ratio import anchor

__all__ = ["advantage_per_sequence", "mean_log_ratio", "sequence_ratio_metrics", "unequal_advantages", "without_ratio"]


def mean_log_ratio(batch: TokenBatch) -> Tensor:
    """Return ``mean_t (logprob_t - anchor_t)`` of each sequence, over the tokens of its ratio; float64 [B], differentiable.

    These are the trained tokens with ``sequence_ratio_mask``, where that is given; 0 where there are none.

    Raises:
        MissingFieldError: the batch has neither ``weights`` nor ``sequence_ratio_mask``.
        LengthError: it has several candidates per token.
    """
    taken = _taken(batch)
    sums = row_sum(wide(batch.logprobs), anchor(batch), taken, None, batch.layout)
    return sums / batch.layout.row_sums(taken).clamp(min=1)


def advantage_per_sequence(batch: TokenBatch) -> Tensor:
    """Return the mean advantage over the trained tokens of each sequence; float64 [B], detached."""
    advantages = select(_advantages(batch).double(), batch.mask)
    return batch.layout.row_sums(advantages) / batch.tokens_per_sequence.clamp(min=1)


def unequal_advantages(batch: TokenBatch, name: str) -> Problem:
    """Return the problem of a sequence whose trained tokens have different advantages."""
    shared = batch.layout.spread(advantage_per_sequence(batch), batch.logprobs.dim())
    advantages = _advantages(batch).double()
    apart = select((advantages - shared).abs() - 1e-6 * advantages.abs(), batch.mask) > 0
    message = f"{name} of the sequence form takes one advantage per sequence, but those of a sequence differ; use form='token'"
    return Problem(apart.any(), lambda: DatumError(message))


def without_ratio(batch: TokenBatch, name: str) -> tuple[Problem, ...]:
    """Return the problems of a ``sequence_ratio_mask``: it leaves a trained sequence without a ratio, or is not trained."""
    mask = batch.sequence_ratio_mask
    if mask is None:
        return ()
    empty = (batch.layout.row_sums(_taken(batch)) == 0) & (batch.tokens_per_sequence > 0)
    none = f"{name}: a sequence has no trained token in its sequence_ratio_mask, so it has no ratio"
    untrained = (
        f"{name}: sequence_ratio_mask has a token of weight 0; give it a weight, and an advantage of 0 if need be"
    )
    return (
        Problem(empty.any(), lambda: EmptyUnitError(none)),
        Problem(((mask != 0) & ~batch.trained).any(), lambda: DatumError(untrained)),
    )


def sequence_ratio_metrics(batch: TokenBatch, clip: ClipRange, dual: float | None = None) -> dict[str, DeferredMetric]:
    """Return mean and maximum of the ratio over the sequences, and the fractions that are clipped, and bounded by ``dual``."""
    there = (batch.tokens_per_sequence > 0).double()
    ratio, advantages = bounded_exp(mean_log_ratio(batch)) * there, advantage_per_sequence(batch)
    clipped = ((ratio > clip.high) & (advantages > 0)) | ((ratio < clip.low) & (advantages < 0))
    count = there.sum()
    metrics = {
        "sequence_ratio": mean(ratio, count),
        "sequence_ratio_largest": maximum(ratio, count),
        "clip_fraction": mean(clipped.double() * there, count),
    }
    if dual is not None:
        bounded = (ratio > dual) & (advantages < 0)
        metrics["dual_clip_fraction"] = mean(bounded.double() * there, count)
    return metrics


def _taken(batch: TokenBatch) -> Tensor:
    """Return 1 at the tokens that a sequence's ratio is taken over, else 0."""
    if batch.layout.candidates:
        raise LengthError("several candidates per token have no ratio of a sequence")
    if batch.sequence_ratio_mask is None:
        if batch.weights is None:
            raise MissingFieldError(
                "missing required field 'sequence_ratio_mask': without it and without weights the prompt would be part of a "
                "sequence's ratio"
            )
        return batch.indicator()
    return torch.where(batch.sequence_ratio_mask != 0, batch.indicator(), torch.zeros_like(batch.weight))


def _advantages(batch: TokenBatch) -> Tensor:
    return batch.given("advantages").expand(batch.layout.shape)
