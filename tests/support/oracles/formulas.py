"""The formulas of losses.functional in plain arithmetic, and what compares two ways to compute one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pullback.losses import functional as F

LIMIT, PEAK = 20.0, math.exp(20.0)


class Formula(NamedTuple):
    """A formula of tokens: what it takes after the log-probs, and its value and slope in plain arithmetic."""

    definition: Callable[..., Tensor]
    takes: str  # of "anchor" and "advantages", in this order
    options: tuple[Any, ...]
    scalar: Callable[[float, float, float], tuple[float, float]]  # logprob, log-ratio, advantage

    def arguments(self, anchor: Tensor, advantages: Tensor) -> tuple[Any, ...]:
        tensors = {"anchor": anchor, "advantages": advantages}
        return (*(tensors[name] for name in self.takes.split()), *self.options)


def ratio(d: float) -> float:
    return math.exp(d) if d <= LIMIT else PEAK * (d - LIMIT + 1.0)


def rise(d: float) -> float:
    """Derivative of `ratio`."""
    return math.exp(min(d, LIMIT))


def ppo(low: float, high: float, dual: float = math.inf) -> Callable[[float, float, float], tuple[float, float]]:
    def scalar(_: float, d: float, a: float) -> tuple[float, float]:
        r = ratio(d)
        if a > 0 and r > high:
            return -high * a, 0.0
        if a < 0 and r < low:
            return -low * a, 0.0
        return (-dual * a, 0.0) if a < 0 and r > dual else (-r * a, -rise(d) * a)

    return scalar


def cispo(low: float, high: float) -> Callable[[float, float, float], tuple[float, float]]:
    def scalar(x: float, d: float, a: float) -> tuple[float, float]:
        weight = min(max(ratio(d), low), high)
        return -weight * a * x, -weight * a

    return scalar


def k3(d: float) -> float:
    return (math.expm1(-d) if d >= -LIMIT else PEAK * (1.0 - d - LIMIT) - 1.0) + d


VALUES: dict[str, Callable[[float], float]] = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": k3, "abs": abs}
SLOPES: dict[str, Callable[[float], float]] = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: -math.expm1(min(-d, LIMIT)),
    "abs": lambda d: math.copysign(1.0, d) if d else 0.0,
}
GRADIENTS: dict[str, Callable[[str, float], float]] = {
    "reverse": lambda estimator, d: d,
    "pathwise": lambda estimator, d: SLOPES[estimator](d),
    "none": lambda estimator, d: 0.0,
}


def penalty(estimator: str, gradient: str) -> Callable[[float, float, float], tuple[float, float]]:
    return lambda x, d, a: (VALUES[estimator](d), GRADIENTS[gradient](estimator, d))


FORMULAS = {
    "nll": Formula(F.nll, "", (), lambda x, d, a: (-x, -1.0)),
    "policy_gradient": Formula(F.policy_gradient, "advantages", (), lambda x, d, a: (-a * x, -a)),
    "importance_sampling": Formula(F.importance_sampling, "anchor advantages", (), ppo(0.0, math.inf)),
    "ppo_clip": Formula(F.ppo_clip, "anchor advantages", (), ppo(0.8, 1.2)),
    "ppo_clip above": Formula(F.ppo_clip, "anchor advantages", (0.0, 1.28), ppo(0.0, 1.28)),
    "ppo_clip wide": Formula(F.ppo_clip, "anchor advantages", (0.5, 2 * PEAK), ppo(0.5, 2 * PEAK)),
    "ppo_clip dual": Formula(F.ppo_clip, "anchor advantages", (0.8, 1.2, 3.0), ppo(0.8, 1.2, 3.0)),
    "cispo": Formula(F.cispo, "anchor advantages", (), cispo(0.0, 5.0)),
    "cispo range": Formula(F.cispo, "anchor advantages", (0.5, 1.2), cispo(0.5, 1.2)),
    "cispo unbounded": Formula(F.cispo, "anchor advantages", (0.0, math.inf), cispo(0.0, math.inf)),
    # The second argument is the log-ratio itself, in the place of the anchor.
    "gspo_token": Formula(
        F.gspo_token, "anchor advantages", (0.8, 1.2, 3.0), lambda x, d, a: ppo(0.8, 1.2, 3.0)(x, x - d, a)
    ),
    "dro": Formula(
        F.dro, "anchor advantages", (0.3,), lambda x, d, a: (0.15 * d * d - a * x, 0.3 * d - a)
    ),
    **{f"kl {e}": Formula(F.kl, "anchor", (e,), penalty(e, "pathwise")) for e in VALUES},
    **{
        f"kl_penalty {e} {g}": Formula(F.kl_penalty, "anchor", (e, g), penalty(e, g))
        for e, g in itertools.product(VALUES, GRADIENTS)
    },
}  # fmt: skip
PAIRS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "dpo": (F.dpo, (0.3,)),
    "dpo smoothed": (F.dpo, (0.3, 0.1)),
    "log_odds_ratio": (F.log_odds_ratio, (0.9,)),
    "odds_ratio": (F.odds_ratio, (0.9,)),
    "simpo": (F.simpo, (2.5, 0.7)),
    "chosen_nll": (F.chosen_nll, ()),
}

LOG_RATIOS = [
    0.0,
    1e-9,
    -0.1,
    0.3,
    math.log(0.8),
    math.log(1.2),
    math.log(3.0),
    20.0,
    -20.0,
    20.5,
    -25.0,
    90.0,
    -1e4,
    1e4,
]
LOG_RATIOS += [math.nextafter(x, side) for x in LOG_RATIOS[4:9] for side in (-math.inf, math.inf)]
ADVANTAGES = [0.0, -0.0, 1.0, -1.0, 2.5, -1e-3, 1e-300, -1e-300]
EDGES = list(itertools.product([-0.5], LOG_RATIOS, ADVANTAGES))


def tensors(tokens: list[tuple[float, float, float]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Log-probs, anchors and advantages."""
    rows = [(x, x - d, a) for x, d, a in tokens]
    return tuple(torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True))


def by_autograd(definition: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Value and slope of a definition."""
    x = x.detach().clone().requires_grad_()
    value = definition(x, *arguments)
    if not value.requires_grad:
        return value, torch.zeros_like(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def closed(definition: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Value and slope by the closed form."""
    found = F.closed_form_of(definition)
    assert found is not None
    return found(x, *arguments)


def distance(have: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], terms: Tensor | float = 0.0) -> float:
    """Largest difference of values or slopes, relative where they, or the terms they are summed from, are above 1."""
    size = torch.as_tensor(terms).clamp(min=1.0)
    pairs = [(a.double(), b.double()) for a, b in zip(have, want, strict=True)]
    return max(float(((a - b).abs() / torch.maximum(b.abs(), size)).max()) for a, b in pairs)


def shares_memory(results: tuple[Tensor, Tensor], inputs: tuple[Any, ...]) -> bool:
    """True if a result aliases the other, an input or itself."""
    held = [t.untyped_storage().data_ptr() for t in (*results, *inputs) if isinstance(t, Tensor)]
    itself = any(0 in t.stride() and t.numel() > 1 for t in results)
    return itself or len({*held[:2]} - {*held[2:]}) < 2
