"""Loss values as plain loops over sequences and tokens: the summands, so that their sum can be told from their size."""

from __future__ import annotations

import math
from collections.abc import Callable

from pullback.testing import Case, CaseSequence
from pullback.testing.oracles import scale

__all__ = ["cross_entropy", "dpo", "grpo", "orpo"]

Summands = list[float]


def cross_entropy(case: Case, aggregation: str, length: float = 1.0) -> Summands:
    """``-w c / D logprob``."""
    return _tokens(case, aggregation, lambda s, j: -s.logprobs[j], length)


def grpo(
    case: Case,
    aggregation: str,
    clip_range: tuple[float, float] = (0.8, 1.2),
    beta: float = 0.0,
    kl: str = "k3",
    importance: bool = True,
) -> Summands:
    """``w c / D (max(-r A, -clip(r) A) + beta v K)``, with K = D^2 / 2 (k2) or exp(-D) - 1 + D (k3)."""

    def token(s: CaseSequence, j: int) -> float:
        ratio = math.exp(s.logprobs[j] - (s.old_logprobs if case.with_old else s.rollout_logprobs)[j])
        inside = min(max(ratio, clip_range[0]), clip_range[1])
        policy = max(-ratio * s.advantages[j], -inside * s.advantages[j])
        if not beta:
            return policy
        d = s.logprobs[j] - s.ref_logprobs[j]
        weight = math.exp(s.logprobs[j] - s.rollout_logprobs[j]) if importance else 1.0
        return policy + beta * weight * {"k2": d * d / 2, "k3": math.expm1(-d) + d}[kl]

    return _tokens(case, aggregation, token)


def dpo(case: Case, beta: float, smoothing: float) -> Summands:
    """``-(1 - e) log sigmoid(z) - e log sigmoid(-z)`` of each pair, over their number."""

    def pair(chosen: CaseSequence, rejected: CaseSequence) -> float:
        z = beta * (_weighted(chosen, relative=True) - _weighted(rejected, relative=True))
        return (1 - smoothing) * _softplus(-z) + smoothing * _softplus(z)

    return _pairs(case, pair)


def orpo(case: Case, lam: float) -> Summands:
    """``-a - lambda log sigmoid(lo(a) - lo(b))`` of each pair, over their number; lo is the log of the odds."""

    def pair(chosen: CaseSequence, rejected: CaseSequence) -> float:
        a, b = (_weighted(s) / math.fsum(s.weights) for s in (chosen, rejected))
        z = (a - math.log(-math.expm1(a))) - (b - math.log(-math.expm1(b)))
        return -a + lam * _softplus(-z)

    return _pairs(case, pair)


def _tokens(case: Case, aggregation: str, value: Callable[[CaseSequence, int], float], length: float = 1.0) -> Summands:
    factor = scale(case, aggregation, length)
    return [s.weights[j] * factor(s) * value(s, j) for s in case.sequences for j in s.trained()]


def _pairs(case: Case, value: Callable[[CaseSequence, CaseSequence], float]) -> Summands:
    sides = list(zip(case.sequences[::2], case.sequences[1::2], strict=True))
    return [value(chosen, rejected) / len(sides) for chosen, rejected in sides]


def _weighted(s: CaseSequence, *, relative: bool = False) -> float:
    return math.fsum(s.weights[j] * (s.logprobs[j] - (s.ref_logprobs[j] if relative else 0.0)) for j in s.trained())


def _softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))
