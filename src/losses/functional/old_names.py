"""Old formulas whose arguments have changed: they work for one release and name the new one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...deprecation import renamed_keyword, replaced
from .kl import KLEstimator, kl
from .policy import clipped_ratio_loss
from .preference import dpo

__all__ = ["clipped_surrogate", "dpo_sigmoid", "kl_value"]


class _Range(Protocol):
    """A range of ratios."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


@replaced("losses.functional.ppo_clip(logprobs, anchor, advantages, low, high)")
@renamed_keyword("band", "clip")
def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: _Range | float | None) -> Tensor:
    """Return ``max(-r A, -clip(r) A)`` from the ratio itself; a number is an epsilon, None clips nothing."""
    if clip is None:
        return -ratio * advantages.detach()
    low, high = (1.0 - clip, 1.0 + clip) if isinstance(clip, int | float) else (clip.low, clip.high)
    return clipped_ratio_loss(ratio, advantages, low, high)


@replaced("losses.functional.kl(logprobs, ref_logprobs, estimator)")
def kl_value(estimator: KLEstimator, log_ratio: Tensor) -> Tensor:
    """Return the estimate of the KL from the log-ratio ``D`` itself."""
    return kl(log_ratio, 0.0, estimator)


@replaced("losses.functional.dpo(chosen, rejected, beta, label_smoothing)")
def dpo_sigmoid(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the DPO loss from the scaled margin ``z`` itself."""
    return dpo(margin, margin.new_zeros(()), 1.0, label_smoothing)
