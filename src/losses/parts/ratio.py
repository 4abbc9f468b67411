"""Probability ratios of the policy to its anchor, and what to log of them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..batch import TokenBatch
from ..functional.kl import kl_value
from ..functional.numerics import EXPONENT_LIMIT, bounded_exp
from ..metrics import Metric, maximum, mean, total
from .clip import ClipRange

__all__ = ["anchor_ratio", "ratio_metrics"]


def anchor_ratio(batch: TokenBatch) -> Tensor:
    """Return policy / anchor, differentiable, 1 where untrained; the anchor is ``old_logprobs``, else the sampler's."""
    return bounded_exp(batch.policy - batch.masked(_anchor(batch)))


def ratio_metrics(batch: TokenBatch, clip: ClipRange | None) -> dict[str, Metric]:
    """Return ratio, clipping and signal over the trained tokens; ESS / N is ``ratio^2 / ratio_squared``."""
    trained, advantages, ratio = batch.trained, batch.masked("advantages"), anchor_ratio(batch)
    log_ratio = batch.policy - batch.masked(_anchor(batch))
    metrics = {
        "ratio": mean(ratio, trained),
        "ratio_largest": maximum(ratio, trained),
        "ratio_squared": mean(ratio.double().square(), trained),
        "ratio_saturated": total((log_ratio > EXPONENT_LIMIT)[trained].sum()),
        "kl_anchor": mean(kl_value("k3", log_ratio), trained),
        "advantage": mean(advantages, trained),
        "advantage_abs": mean(advantages.abs(), trained),
    }
    if clip is not None:
        metrics["clip_fraction"] = mean(clip.clips(ratio, advantages).double(), trained)
    return metrics


def _anchor(batch: TokenBatch) -> Literal["old_logprobs", "rollout_logprobs"]:
    return "rollout_logprobs" if batch.old_logprobs is None else "old_logprobs"
