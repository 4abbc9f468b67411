"""What SkyRL's policy losses compute, with the options of its configurations (0.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..aggregation import Aggregation
from ..base import Loss
from ..checks import choice
from ..parts.clip import ClipRange
from ..parts.correction import Correction
from ..policy import CISPO, GRPO, GSPO
from .rows import over_all_rows

__all__ = ["PRESETS"]

_REDUCTIONS: Final[dict[str, str | Aggregation]] = {
    "token_mean": "token_mean",
    "sequence_mean": over_all_rows("sequence_mean_token_mean"),
    "prompt_mean": "group_mean_token_mean",
}


def _reduction(name: str) -> str | Aggregation:
    choice("loss_reduction", name, _REDUCTIONS)
    return _REDUCTIONS[name]


def _truncated(kind: str | None, token: float, sequence: float) -> Correction | None:
    if kind is None:
        return None
    choice("tis_ratio_type", kind, ("token", "sequence"))
    return Correction.tis(token) if kind == "token" else Correction.tis(sequence, level="sequence")


def _regular(
    eps_clip_low: float = 0.2,
    eps_clip_high: float = 0.2,
    loss_reduction: str = "token_mean",
    tis_ratio_type: str | None = None,
    token_tis_ratio_clip_high: float = 2.0,
    sequence_tis_ratio_clip_high: float = 5.0,
) -> Loss:
    return GRPO(
        ClipRange.from_epsilon(eps_clip_low, eps_clip_high),
        aggregation=_reduction(loss_reduction),
        correction=_truncated(tis_ratio_type, token_tis_ratio_clip_high, sequence_tis_ratio_clip_high),
    )


def _dual_clip(
    eps_clip_low: float = 0.2,
    eps_clip_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    loss_reduction: str = "token_mean",
) -> Loss:
    clip = ClipRange.from_epsilon(eps_clip_low, eps_clip_high)
    return GRPO(clip, aggregation=_reduction(loss_reduction), dual_clip=clip_ratio_c)


def _cispo(
    cispo_eps_clip_low: float = 1.0, cispo_eps_clip_high: float = 4.0, loss_reduction: str = "token_mean"
) -> Loss:
    return CISPO(ClipRange.from_epsilon(cispo_eps_clip_low, cispo_eps_clip_high), _reduction(loss_reduction))


def _gspo(eps_clip_low: float = 0.2, eps_clip_high: float = 0.2, loss_reduction: str = "sequence_mean") -> Loss:
    return GSPO(ClipRange.from_epsilon(eps_clip_low, eps_clip_high), _reduction(loss_reduction))


PRESETS: Final[dict[str, Callable[..., Loss]]] = {
    "skyrl:regular": _regular,
    "skyrl:dual_clip": _dual_clip,
    "skyrl:cispo": _cispo,
    "skyrl:gspo": _gspo,
}
