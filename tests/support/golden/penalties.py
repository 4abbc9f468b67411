"""The golden values of policy losses with a KL to the reference in the same loss, and with truncated weights too."""

from __future__ import annotations

from typing import Any, Final

from golden.case import FP32, Case

from pullback.losses import GRPO, KL, Aggregation, ClipRange, Correction, Loss, fixed_length, preset
from pullback.losses.functional.kl import KLEstimator
from pullback.losses.parts.kl import KLGradient
from pullback.losses.presets.rows import over_all_rows

__all__ = ["skyrl_penalties", "skyrl_two_means", "verl_penalties"]

ALONE: Final = "GRPO with KL"
WEIGHTED: Final = "truncated weights with KL"
TOKEN: Final = Correction.tis(1.5)
SEQUENCE: Final = Correction.tis(2.0, level="sequence")


def _penalised(
    aggregation: Aggregation | str,
    correction: Correction | None = None,
    estimator: KLEstimator = "k3",
    gradient: KLGradient = "pathwise",
    beta: float = 0.04,
) -> Loss:
    kl = KL(estimator, beta, gradient, importance=False)
    return GRPO(ClipRange.from_epsilon(0.2, 0.28), kl, aggregation=aggregation, correction=correction)


def _case(family: str, aggregation: Aggregation | str, tolerance: float = 1e-12, **options: Any) -> Case:
    """The control has ten times the penalty."""
    control = _penalised(aggregation, **{**options, "beta": 0.4})
    return Case(_penalised(aggregation, **options), family, control, tolerance)


def verl_penalties() -> dict[str, Case]:
    """Of verl's actor, whose KL is aggregated as the rest of the loss, and is not weighted."""
    straight = _penalised("token_mean", gradient="reverse")
    return {
        "grpo_kl-tokens": _case(ALONE, "token_mean"),
        "grpo_kl-rows": _case(ALONE, "sequence_mean_token_mean", 1e-7),  # verl adds 1e-8 to each length
        "grpo_kl-rows-norm-16": _case(ALONE, fixed_length(16)),
        "grpo_kl-tokens-k2": _case(ALONE, "token_mean", estimator="k2"),
        "grpo_kl-tokens-k3+": Case(straight, ALONE, _penalised("token_mean")),
        "tis-token-kl": _case(WEIGHTED, "token_mean", correction=TOKEN),
        "tis-sequence-kl": _case(WEIGHTED, "token_mean", correction=SEQUENCE),
    }


def skyrl_penalties() -> dict[str, Case]:
    """Of SkyRL's worker where its reduction is that of its KL, which is a mean within and over all sequences."""
    rows = over_all_rows("sequence_mean_token_mean")
    return {
        "ppo_kl-tokens": _case(ALONE, rows, FP32),
        "ppo_kl-rows": _case(ALONE, rows, FP32),
        "tis-token-kl": _case(WEIGHTED, rows, FP32, correction=TOKEN),
        "tis-sequence-kl": _case(WEIGHTED, rows, FP32, correction=SEQUENCE),
    }


def skyrl_two_means() -> tuple[Case, Loss, Loss]:
    """Of SkyRL's default: a mean of tokens with a KL of another mean; ours has one, and two of ours add up to it."""
    policy = preset("skyrl:regular", eps_clip_high=0.28)
    penalty = GRPO(None, KL("k3", 0.04, "pathwise", importance=False), "none", "sequence_mean_token_mean")
    return _case(ALONE, "token_mean"), policy, penalty
