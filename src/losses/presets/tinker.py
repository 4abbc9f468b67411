"""The losses of the Tinker protocol, and of published scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..base import Loss
from ..parts.clip import ClipRange
from ..parts.kl import KL
from ..policy import CISPO, DRO, GRPO, GSPO, PPO, ImportanceSampling
from ..preference import DPO
from ..supervised import CrossEntropy

__all__ = ["PRESETS"]


def _ppo(clip_low_threshold: float = 0.8, clip_high_threshold: float = 1.2) -> Loss:
    return PPO(ClipRange(clip_low_threshold, clip_high_threshold))


def _cispo(clip_low_threshold: float = 0.0, clip_high_threshold: float = 5.0) -> Loss:
    return CISPO(ClipRange(clip_low_threshold, clip_high_threshold))


def _gspo(clip_low_threshold: float = 1 - 3e-4, clip_high_threshold: float = 1 + 4e-4) -> Loss:
    return GSPO(ClipRange(clip_low_threshold, clip_high_threshold))


def _seed_grpo(kl_beta: float = 0.001) -> Loss:
    # k1 in the loss: acknowledged, because the point is to reproduce that script.
    kl = KL("k1", kl_beta, "pathwise", importance=False, acknowledge_biased=True)
    return GRPO(clip=None, kl=kl, anchor="none", aggregation="sequence_mean_token_sum")


def _clip_higher(clip_ratio_low: float = 0.2, clip_ratio_high: float = 0.28) -> Loss:
    # The mean over all tokens is that of DAPO's code; its paper averages within each prompt's group first.
    return GRPO(ClipRange.from_epsilon(clip_ratio_low, clip_ratio_high))


PRESETS: Final[dict[str, Callable[..., Loss]]] = {
    "tinker:cross_entropy": CrossEntropy,
    "tinker:importance_sampling": ImportanceSampling,
    "tinker:ppo": _ppo,
    "tinker:cispo": _cispo,
    "tinker:gspo": _gspo,
    "tinker:dro": lambda beta=0.05: DRO(beta),
    "seed:cross_entropy": lambda: CrossEntropy("sequence_mean_token_sum"),
    "seed:grpo": _seed_grpo,
    "seed:dpo": lambda beta=0.1: DPO(beta),
    "dapo:clip_higher": _clip_higher,
}
