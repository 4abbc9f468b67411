"""Probability ratios of the policy to its anchor, and what to log of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch.selection import select_, wide
from ..batch.token_batch import TokenBatch
from ..evaluation.metrics import DeferredMetric, maximum, mean, total
from ..functional.kl import kl
from ..functional.numerics import EXPONENT_LIMIT, bounded_exp
from .clip import ClipRange

__all__ = ["anchor", "importance_ratio", "ratio_metrics"]


def anchor(batch: TokenBatch) -> Tensor:
    """Return the log-probs that ratios are taken against: ``old_logprobs`` where given, else the sampler's."""
    return batch.given("rollout_logprobs" if batch.old_logprobs is None else "old_logprobs")


def importance_ratio(batch: TokenBatch, of: Tensor) -> Tensor:
    """Return policy / the policy with the log-probs ``of`` for each token, detached: the weight of what the latter drew."""
    return bounded_exp(wide(batch.logprobs.detach()) - of)


def ratio_metrics(batch: TokenBatch, clip: ClipRange | None, dual: float | None = None) -> dict[str, DeferredMetric]:
    """Return ratio, clipping and signal over the trained tokens; ESS / N is ``ratio^2 / ratio_squared``."""
    mask, count = batch.mask, batch.trained_count
    log_ratio = select_(wide(batch.logprobs.detach()) - anchor(batch), mask)
    ratio = select_(bounded_exp(log_ratio), mask)
    metrics = {
        "ratio": mean(ratio, count),
        "ratio_largest": maximum(ratio, count),
        "ratio_squared": mean(ratio.square(), count),
        "ratio_saturated": total(_kept_above(batch.kept, log_ratio, EXPONENT_LIMIT)),
        "kl_anchor": mean(kl(log_ratio, 0.0), count),
        **_advantage_metrics(batch, count),
    }
    # One sign per row, where there is one advantage per row.
    sign = batch.given("advantages").sign()
    if clip is not None:
        # Clipped is a ratio above high where A > 0, and one below low where A < 0.
        high = min(clip.high, torch.finfo(sign.dtype).max)
        edge = sign.clamp(min=0.0).mul_(-high) - sign.clamp(max=0.0).mul_(clip.low)
        beyond = torch.addcmul(edge, ratio, sign)
        metrics["clip_fraction"] = mean(_kept_above(batch.kept, beyond, 0.0), count)
    if dual is not None:
        beyond = ratio.sub(dual).mul_(sign.clamp(max=0.0).neg_())
        metrics["dual_clip_fraction"] = mean(_kept_above(batch.kept, beyond, 0.0), count)
    return metrics


def _advantage_metrics(batch: TokenBatch, count: Tensor) -> dict[str, DeferredMetric]:
    given, mask = batch.given("advantages"), batch.mask
    if given.shape == batch.layout.shape:
        kept = select_(given.clone(), mask)
        return {"advantage": mean(kept, count), "advantage_abs": mean(kept.abs(), count)}
    trained = (
        batch.layout.row_sums(batch.trained.to(given.dtype)) if batch.layout.candidates else batch.tokens_per_sequence
    )
    per_row = torch.where(trained > 0, given.flatten(), 0.0) * trained
    return {"advantage": mean(per_row, count), "advantage_abs": mean(per_row.abs(), count)}


def _kept_above(kept: Tensor, values: Tensor, limit: float) -> Tensor:
    """Return ``kept`` where ``values`` are above ``limit``, else 0.

    The backward of a threshold does so in one pass; a comparison and its sum cost ten times as much on the CPU.
    """
    found: Tensor = torch.ops.aten.threshold_backward(kept, values, limit)
    return found
