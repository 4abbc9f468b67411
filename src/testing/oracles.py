"""Closed-form cotangents, dL/dlogprob, as plain loops over sequences and tokens, independent of autograd and `losses`."""

from __future__ import annotations

import math
from collections.abc import Callable

from .cases import Case, CaseSequence

__all__ = [
    "cispo",
    "correction",
    "cross_entropy",
    "dpo",
    "dro",
    "finite_differences",
    "grpo",
    "gspo",
    "kto",
    "orpo",
    "simpo",
]

Cotangent = list[list[float]]


def scale(case: Case, aggregation: str, length: float = 1.0) -> Callable[[CaseSequence], float]:
    """Return a function from a sequence to the factor c / D of its tokens."""
    counts = [len(s.trained()) for s in case.sequences]
    trained = [s for s in case.sequences if s.trained()]
    groups = {s.group for s in trained}
    in_group = {g: sum(len(s.trained()) for s in case.sequences if s.group == g) for g in groups}
    match aggregation:
        case "sum":
            return lambda s: 1.0
        case "token_mean":
            return lambda s: 1.0 / sum(counts)
        case "weighted_mean":
            return lambda s: 1.0 / sum(w for x in case.sequences for w in x.weights)
        case "sequence_mean_token_mean":
            return lambda s: 1.0 / (len(s.trained()) * len(trained))
        case "sequence_mean_token_sum" | "sequence_mean":
            return lambda s: 1.0 / len(trained)
        case "group_mean_token_mean":
            return lambda s: 1.0 / (in_group[s.group] * len(groups))
        case "fixed_length":
            return lambda s: 1.0 / (length * len(trained))
        case _:
            raise ValueError(aggregation)


def cross_entropy(case: Case, aggregation: str, length: float = 1.0) -> Cotangent:
    """``-w c / D``."""
    factor = scale(case, aggregation, length)
    return [[-w * factor(s) if w else 0.0 for w in s.weights] for s in case.sequences]


def grpo(
    case: Case,
    aggregation: str = "token_mean",
    clip_range: tuple[float, float] | None = (0.8, 1.2),
    beta: float = 0.0,
    kl: str = "reverse",
    ratio: bool = True,
    importance: bool = True,
    dual: float = math.inf,
    weights: Cotangent | None = None,
) -> Cotangent:
    """``w c / D (-u r A [not clipped] + beta v dK)`` with dK = D (reverse, k2), 1 - exp(-D) (k3 pathwise) or 1 (k1 pathwise).

    v is the ratio to the sampler, or 1 without ``importance``; without ``ratio`` the policy part is ``-A``. u is ``weights``, a
    correction's. A token with A < 0 and r > ``dual`` is clipped too.
    """
    factor = scale(case, aggregation)
    u = {id(s): row for s, row in zip(case.sequences, weights or [], strict=False)}

    def token(s: CaseSequence, j: int) -> float:
        anchor = s.old_logprobs if case.with_old else s.rollout_logprobs
        r = math.exp(s.logprobs[j] - anchor[j]) if ratio else 1.0
        v = math.exp(s.logprobs[j] - s.rollout_logprobs[j]) if importance else 1.0
        a = s.advantages[j]
        clipped = clip_range is not None and ((a > 0 and r > clip_range[1]) or (a < 0 and r < clip_range[0]))
        clipped = clipped or (a < 0 and r > dual)
        d = s.logprobs[j] - s.ref_logprobs[j]
        slope = {"reverse": d, "k2": d, "k3": 1 - math.exp(-d), "k1": 1.0, "none": 0.0}[kl]
        policy = 0.0 if clipped else -r * a * (u[id(s)][j] if u else 1.0)
        return s.weights[j] * factor(s) * (policy + beta * v * slope)

    return [[token(s, j) if s.weights[j] else 0.0 for j in range(len(s.weights))] for s in case.sequences]


def cispo(case: Case, aggregation: str = "sum", low: float = 0.0, high: float = 5.0) -> Cotangent:
    """``-w c / D clip(r) A``."""
    factor = scale(case, aggregation)

    def token(s: CaseSequence, j: int) -> float:
        return -s.weights[j] * factor(s) * min(max(math.exp(_log_ratio(case, s, j)), low), high) * s.advantages[j]

    return [[token(s, j) if s.weights[j] else 0.0 for j in range(len(s.weights))] for s in case.sequences]


def dro(case: Case, aggregation: str = "sum", beta: float = 0.05) -> Cotangent:
    """``w c / D (beta (logprob - anchor) - A)``."""
    factor = scale(case, aggregation)

    def token(s: CaseSequence, j: int) -> float:
        return s.weights[j] * factor(s) * (beta * _log_ratio(case, s, j) - s.advantages[j])

    return [[token(s, j) if s.weights[j] else 0.0 for j in range(len(s.weights))] for s in case.sequences]


def gspo(
    case: Case, aggregation: str = "sum", form: str = "token", low: float = 1 - 3e-4, high: float = 1 + 4e-4
) -> Cotangent:
    """``-w c / D s A`` (token form), or ``-w' c / D s A / n`` with w' the mean weight (sequence form); 0 where s is clipped."""
    factor = scale(case, aggregation)

    def token(s: CaseSequence, j: int) -> float:
        at, a = s.trained(), s.advantages[j]
        ratio = math.exp(math.fsum(_log_ratio(case, s, k) for k in at) / len(at))
        if (a > 0 and ratio > high) or (a < 0 and ratio < low):
            return 0.0
        w = s.weights[j] if form == "token" else math.fsum(s.weights) / len(at) ** 2
        return -w * factor(s) * ratio * a

    return [[token(s, j) if s.weights[j] else 0.0 for j in range(len(s.weights))] for s in case.sequences]


def correction(
    case: Case, weight: str = "truncate", level: str = "token", low: float = 0.0, high: float = 2.0
) -> Cotangent:
    """Return the weight of each token: old / sampler, of the token, the product or the geometric mean of its sequence.

    ``truncate`` clips it to [low, high], ``mask`` makes it 0 outside; untrained tokens have 0.
    """

    def token(s: CaseSequence, j: int) -> float:
        logs = [s.old_logprobs[k] - s.rollout_logprobs[k] for k in s.trained()]
        mean = math.fsum(logs) / len(logs)
        log = {"sequence": math.fsum(logs), "geometric": mean, "token": s.old_logprobs[j] - s.rollout_logprobs[j]}[
            level
        ]
        ratio = math.exp(log)
        return min(max(ratio, low), high) if weight == "truncate" else ratio * (low <= ratio <= high)

    return [[token(s, j) if s.weights[j] else 0.0 for j in range(len(s.weights))] for s in case.sequences]


def simpo(case: Case, beta: float = 2.0, gamma: float = 1.0) -> Cotangent:
    """``-+ beta w / sum(w) sigmoid(-z) / P``."""
    pairs = len(case.sequences) // 2
    cotangents: Cotangent = []
    for p in range(pairs):
        chosen, rejected = case.sequences[2 * p], case.sequences[2 * p + 1]
        slope = beta * _sigmoid(gamma - beta * (_mean(chosen) - _mean(rejected))) / pairs
        cotangents.append([-slope * w / sum(chosen.weights) if w else 0.0 for w in chosen.weights])
        cotangents.append([slope * w / sum(rejected.weights) if w else 0.0 for w in rejected.weights])
    return cotangents


def dpo(case: Case, beta: float = 0.1, smoothing: float = 0.0) -> Cotangent:
    """``-+ beta w [(1 - e) sigmoid(-z) - e sigmoid(z)] / P``."""
    pairs = len(case.sequences) // 2
    cotangents: Cotangent = []
    for p in range(pairs):
        chosen, rejected = case.sequences[2 * p], case.sequences[2 * p + 1]
        z = beta * (_shift(chosen) - _shift(rejected))
        slope = -(1 - smoothing) * _sigmoid(-z) + smoothing * _sigmoid(z)
        cotangents.append([beta * slope * w / pairs if w else 0.0 for w in chosen.weights])
        cotangents.append([-beta * slope * w / pairs if w else 0.0 for w in rejected.weights])
    return cotangents


def kto(
    case: Case, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0, zero: bool = False
) -> Cotangent:
    """``-+ v beta w s (1 - s) / B``, s the sigmoid of ``beta (h - z0)``; B sequences have a trained token."""
    factor = scale(case, "sequence_mean")
    cotangents: Cotangent = []
    for s in case.sequences:
        z = beta * (_shift(s) - (0.0 if zero else s.reference_point))
        reached = _sigmoid(z)
        weight = -desirable if s.label else undesirable
        slope = weight * beta * reached * _sigmoid(-z)
        cotangents.append([slope * w * factor(s) if w else 0.0 for w in s.weights])
    return cotangents


def orpo(case: Case, lam: float = 0.1, max_prob: float = 1 - 1e-4) -> Cotangent:
    """``w / sum(w) / P`` times ``-1 - lam sigmoid(-z) / (1 - p)`` (chosen) or ``lam sigmoid(-z) / (1 - p)`` (rejected)."""
    pairs = len(case.sequences) // 2
    cotangents: Cotangent = []
    for p in range(pairs):
        chosen, rejected = case.sequences[2 * p], case.sequences[2 * p + 1]
        a, b = _mean(chosen), _mean(rejected)
        slope = _sigmoid(-(_log_odds(a, max_prob) - _log_odds(b, max_prob)))
        da = -1 - lam * slope / (1 - min(math.exp(a), max_prob))
        db = lam * slope / (1 - min(math.exp(b), max_prob))
        for s, d in ((chosen, da), (rejected, db)):
            cotangents.append([d * w / sum(s.weights) / pairs if w else 0.0 for w in s.weights])
    return cotangents


def finite_differences(value: Callable[[list[float]], float], at: list[float], step: float = 1e-6) -> list[float]:
    """Return the central differences of ``value`` in every coordinate."""
    slopes = []
    for i in range(len(at)):
        ahead, behind = list(at), list(at)
        ahead[i] += step
        behind[i] -= step
        slopes.append((value(ahead) - value(behind)) / (2 * step))
    return slopes


def _log_ratio(case: Case, s: CaseSequence, j: int) -> float:
    return s.logprobs[j] - (s.old_logprobs if case.with_old else s.rollout_logprobs)[j]


def _shift(s: CaseSequence) -> float:
    return math.fsum(s.weights[j] * (s.logprobs[j] - s.ref_logprobs[j]) for j in s.trained())


def _mean(s: CaseSequence) -> float:
    return math.fsum(s.weights[j] * s.logprobs[j] for j in s.trained()) / sum(s.weights)


def _log_odds(x: float, max_prob: float) -> float:
    top = math.log(max_prob)
    inside = min(x, top)
    return inside - math.log(-math.expm1(inside)) + max(x - top, 0.0) / (1 - max_prob)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
