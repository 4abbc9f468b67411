"""What verl's policy losses compute, with the options of its configurations (0.9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ...errors import ConfigError
from ..aggregation import Aggregation, fixed_length
from ..base import Loss
from ..checks import choice
from ..parts.clip import ClipRange
from ..parts.correction import Correction, Level, Population
from ..policy import CISPO, DRO, GRPO, GSPO

__all__ = ["PRESETS"]

_MODES: Final = {
    "token-mean": "token_mean",
    "token-sum": "sum",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-mean": "sequence_mean_token_mean",
}


def _aggregation(loss_agg_mode: str, loss_scale_factor: float | None) -> str | Aggregation:
    if loss_agg_mode != "seq-mean-token-sum-norm":
        choice("loss_agg_mode", loss_agg_mode, (*_MODES, "seq-mean-token-sum-norm"))
        return _MODES[loss_agg_mode]
    if loss_scale_factor is None:
        raise ConfigError(
            "seq-mean-token-sum-norm needs loss_scale_factor; without it verl divides by the padded width"
        )
    return fixed_length(loss_scale_factor)


def _rollout_is(level: str | None, threshold: float | str, normalize: bool) -> Correction | None:
    """A number truncates; ``low_high`` masks (IcePop)."""
    if level is None:
        return None
    choice("rollout_is", level, ("token", "sequence"))
    weight_level: Level = "token" if level == "token" else "sequence"
    population: Population | None = None
    if normalize:
        population = "tokens" if level == "token" else "sequences"
    if isinstance(threshold, str) and "_" in threshold:
        low, high = map(float, threshold.split("_"))
        return Correction.masked(low, high, level=weight_level, normalize=population)
    return Correction.tis(float(threshold), level=weight_level, normalize=population)


def _vanilla(
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
    rollout_is: str | None = None,
    rollout_is_threshold: float | str = 2.0,
    rollout_is_batch_normalize: bool = False,
) -> Loss:
    return GRPO(
        ClipRange.from_epsilon(clip_ratio_low, clip_ratio_high),
        aggregation=_aggregation(loss_agg_mode, loss_scale_factor),
        dual_clip=clip_ratio_c,
        correction=_rollout_is(rollout_is, rollout_is_threshold, rollout_is_batch_normalize),
    )


def _cispo(clip_ratio_low: float = 0.2, clip_ratio_high: float = 0.2, loss_agg_mode: str = "token-mean") -> Loss:
    return CISPO(ClipRange.from_epsilon(clip_ratio_low, clip_ratio_high), _aggregation(loss_agg_mode, None))


def _gspo(
    clip_ratio_low: float = 0.2, clip_ratio_high: float = 0.2, loss_agg_mode: str = "seq-mean-token-mean"
) -> Loss:
    return GSPO(ClipRange.from_epsilon(clip_ratio_low, clip_ratio_high), _aggregation(loss_agg_mode, None))


def _dro(dro_beta: float, loss_agg_mode: str = "token-mean") -> Loss:
    return DRO(dro_beta, _aggregation(loss_agg_mode, None))


def _bypass_reinforce(rollout_is_threshold: float = 2.0, loss_agg_mode: str = "token-mean") -> Loss:
    # Its truncated weight is of the current policy, recomputed in every step: CISPO against the sampler.
    return CISPO(ClipRange(0.0, rollout_is_threshold), _aggregation(loss_agg_mode, None))


PRESETS: Final[dict[str, Callable[..., Loss]]] = {
    "verl:vanilla": _vanilla,
    "verl:cispo": _cispo,
    "verl:gspo": _gspo,
    "verl:dro": _dro,
    "verl:bypass_reinforce": _bypass_reinforce,
}
