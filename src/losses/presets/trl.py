"""What TRL's trainers compute, with the options of its configurations (1.16)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, Literal

from ...errors import ConfigError
from ..aggregation import Aggregation, fixed_length
from ..base import Loss
from ..parts.clip import ClipRange
from ..parts.correction import Correction
from ..parts.kl import KL
from ..policy import CISPO, GRPO, GSPO
from ..preference import DPO, KTO, ORPO, SimPO
from .rows import over_all_rows

__all__ = ["PRESETS"]

_MODES: Final = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def _grpo(
    aggregation: str | Aggregation,
    beta: float,
    epsilon: float,
    epsilon_high: float | None,
    use_bias_correction_kl: bool,
    delta: float | None,
    correction: Correction | None,
) -> Loss:
    # The corrected k3 has exactly the gradient of the reverse KL; the uncorrected one is k3's own derivative.
    # Its weight is the ratio to old_logprobs.
    corrected = KL("k3", beta, importance="anchor", acknowledge_biased=True)
    plain = KL("k3", beta, "pathwise", importance=False)
    kl = (corrected if use_bias_correction_kl else plain) if beta else None
    clip = ClipRange.from_epsilon(epsilon, epsilon_high)
    return GRPO(clip, kl, aggregation=aggregation, dual_clip=delta, correction=correction)


def _vllm(use: bool, mode: str, low: float | None, high: float) -> Correction | None:
    if not use:
        return None
    if mode not in _MODES:
        raise ConfigError(f"vllm_importance_sampling_mode must be one of {', '.join(_MODES)}, got {mode!r}")
    level, weight = mode.split("_")
    correction = Correction(high=high, low=low or 0.0, level="token" if level == "token" else "sequence")
    return correction if weight == "truncate" else replace(correction, weight="mask")


def _of(aggregation: str | Aggregation) -> Callable[..., Loss]:
    def build(
        beta: float = 0.0,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        use_bias_correction_kl: bool = True,
        delta: float | None = None,
        use_vllm: bool = False,
        vllm_importance_sampling_mode: str = "sequence_mask",
        vllm_importance_sampling_clip_max: float = 3.0,
        vllm_importance_sampling_clip_min: float | None = None,
    ) -> Loss:
        correction = _vllm(
            use_vllm,
            vllm_importance_sampling_mode,
            vllm_importance_sampling_clip_min,
            vllm_importance_sampling_clip_max,
        )
        return _grpo(aggregation, beta, epsilon, epsilon_high, use_bias_correction_kl, delta, correction)

    return build


def _dr_grpo(
    max_completion_length: int = 256,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    use_bias_correction_kl: bool = True,
) -> Loss:
    aggregation = over_all_rows(fixed_length(max_completion_length))
    return _grpo(aggregation, beta, epsilon, epsilon_high, use_bias_correction_kl, None, None)


def _cispo(epsilon_high: float = 5.0) -> Loss:
    # An absolute bound. TRL's own default of 0.2 gives every token one weight, and is refused.
    return CISPO(ClipRange(0.0, epsilon_high), "token_mean")


def _gspo(epsilon: float = 0.2, epsilon_high: float | None = None) -> Loss:
    return GSPO(ClipRange.from_epsilon(epsilon, epsilon_high), over_all_rows("sequence_mean"), "sequence")


def _luspo(epsilon: float = 0.2, epsilon_high: float | None = None) -> Loss:
    # n times the loss of a sequence of n tokens is the token form's sum.
    return GSPO(ClipRange.from_epsilon(epsilon, epsilon_high), over_all_rows("sequence_mean_token_sum"))


def _kto(baseline: Literal["given", "zero"]) -> Callable[..., Loss]:
    def build(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
        return KTO(beta, desirable_weight, undesirable_weight, baseline)

    return build


PRESETS: Final[dict[str, Callable[..., Loss]]] = {
    "trl:dpo": lambda beta=0.1: DPO(beta),
    "trl:grpo": _of(over_all_rows("sequence_mean_token_mean")),
    "trl:dapo": _of("token_mean"),
    "trl:bnpo": _of("token_mean"),
    "trl:dr_grpo": _dr_grpo,
    "trl:cispo": _cispo,
    "trl:gspo": _gspo,
    "trl:luspo": _luspo,
    # TRL takes z0 of each micro-batch, over all ranks; here it is an input
    "trl:kto": _kto("given"),
    "trl:apo_zero_unpaired": _kto("zero"),
    "trl:orpo": lambda beta=0.1: ORPO(beta, nll="token_mean"),
    # of CPOTrainer with cpo_alpha=0; by default that trainer adds an NLL
    "trl:simpo": lambda beta=0.1, simpo_gamma=0.5: SimPO(beta, simpo_gamma),
}
