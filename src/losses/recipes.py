"""Recipes (loss and normalisation together) and presets (another project's habits by name)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar

from ..errors import ConfigError, suggestion
from .aggregation import Aggregation, fixed_length
from .base import Loss, Normalization
from .parts.clip import ClipRange
from .parts.kl import KL
from .policy import GRPO, PPO, ImportanceSampling
from .preference import DPO, ORPO
from .supervised import CrossEntropy

__all__ = ["Recipe", "preset", "preset_names", "recipe"]
Built = TypeVar("Built")


class Recipe(NamedTuple):
    """A loss and the ``grad_accumulation_normalization`` of ``optim_step`` that belongs to it."""

    loss: Loss
    normalization: Normalization | None


_RECIPES: Final[dict[str, Callable[..., Recipe]]] = {
    "sft": lambda: Recipe(CrossEntropy("token_mean"), None),
    "grpo": lambda: Recipe(GRPO(aggregation="sum"), "num_loss_tokens"),
    "dpo": lambda: Recipe(DPO(), None),
    "orpo": lambda: Recipe(ORPO(), None),
}


def recipe(name: str) -> Recipe:
    """Return the loss and the normalisation mode of a training recipe.

    ====  =======================  ===================
    name  loss                     normalisation
    ====  =======================  ===================
    sft   token-mean NLL           None
    grpo  GRPO, raw token sum      ``num_loss_tokens``
    dpo   DPO, mean over pairs     None
    orpo  ORPO, mean over pairs    None
    ====  =======================  ===================

    Raises:
        ConfigError: no recipe has that name.
    """
    return _lookup("recipe", name, _RECIPES)()


def _seed_grpo(kl_beta: float = 0.001) -> Loss:
    # k1 in the loss: acknowledged, because the point is to reproduce that script.
    kl = KL("k1", kl_beta, "pathwise", importance=False, acknowledge_biased=True)
    return GRPO(clip=None, kl=kl, anchor="none", aggregation="sequence_mean_token_sum")


def _trl_grpo(
    aggregation: str | Aggregation,
    beta: float,
    epsilon: float,
    epsilon_high: float | None,
    use_bias_correction_kl: bool,
) -> Loss:
    # The corrected k3 has exactly the gradient of the reverse KL; the uncorrected one is k3's own derivative.
    # Its weight is the ratio to old_logprobs.
    corrected = KL("k3", beta, importance="anchor", acknowledge_biased=True)
    plain = KL("k3", beta, "pathwise", importance=False)
    kl = corrected if use_bias_correction_kl else plain
    return GRPO(clip=ClipRange.from_epsilon(epsilon, epsilon_high), kl=kl if beta else None, aggregation=aggregation)


def _trl(aggregation: str | Aggregation) -> Callable[..., Loss]:
    def build(
        beta: float = 0.0,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        use_bias_correction_kl: bool = True,
    ) -> Loss:
        return _trl_grpo(aggregation, beta, epsilon, epsilon_high, use_bias_correction_kl)

    return build


def _all_rows(length: float) -> Aggregation:
    return replace(fixed_length(length), denominator="all_sequences")


def _trl_dr_grpo(
    max_completion_length: int = 256,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    use_bias_correction_kl: bool = True,
) -> Loss:
    return _trl_grpo(_all_rows(max_completion_length), beta, epsilon, epsilon_high, use_bias_correction_kl)


_PRESETS: Final[dict[str, Callable[..., Loss]]] = {
    "tinker:cross_entropy": CrossEntropy,
    "tinker:importance_sampling": ImportanceSampling,
    "tinker:ppo": PPO,
    "seed:cross_entropy": lambda: CrossEntropy("sequence_mean_token_sum"),
    "seed:grpo": _seed_grpo,
    "seed:dpo": lambda beta=0.1: DPO(beta),
    "trl:dpo": lambda beta=0.1: DPO(beta),
    # A row without a trained token counts there.
    "trl:grpo": _trl(Aggregation("sequence_mean_token_mean", "sequence", "all_sequences")),
    "trl:dapo": _trl("token_mean"),
    "trl:bnpo": _trl("token_mean"),
    "trl:dr_grpo": _trl_dr_grpo,
    "trl:orpo": lambda beta=0.1: ORPO(beta, nll="token_mean"),
}


def preset(name: str, **overrides: Any) -> Loss:
    """Return the loss that another project computes under a name, e.g. ``preset("trl:dapo", beta=0.04)``.

    ``overrides`` carry that project's own spelling. ``seed:grpo`` has its KL as k1 in the loss, whose expected gradient is
    zero; it reproduces a published example exactly and is not advice.

    Raises:
        ConfigError: no preset has that name, or it has no such option.
    """
    build = _lookup("preset", name, _PRESETS)
    options = inspect.signature(build).parameters
    for key in overrides:
        if key not in options:
            known = ", ".join(options) or "none"
            raise ConfigError(f"preset {name!r} has no option {key!r}{suggestion(key, options)}; it has: {known}")
    return build(**overrides)


def preset_names() -> tuple[str, ...]:
    """The names of all presets, sorted."""
    return tuple(sorted(_PRESETS))


def _lookup(kind: str, name: str, table: dict[str, Callable[..., Built]]) -> Callable[..., Built]:
    if name not in table:
        raise ConfigError(f"unknown {kind} {name!r}{suggestion(name, table)}; known: {', '.join(sorted(table))}")
    return table[name]
