"""What the losses log, as plain loops over numbers: no tensors, no masks."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pullback.testing import Case, CaseSequence

__all__ = [
    "average",
    "bounded_exp",
    "k3",
    "of_pairs",
    "of_ratios",
    "of_sequence_ratios",
    "of_weights",
    "trained_tokens",
]

PEAK = math.exp(20.0)


def average(values: Iterable[float]) -> float:
    """Return the mean, NaN of nothing."""
    known = list(values)
    return math.fsum(known) / len(known) if known else math.nan


def bounded_exp(x: float) -> float:
    """Return exp(x), above 20 its tangent."""
    return math.exp(x) if x <= 20.0 else PEAK * (1.0 + x - 20.0)


def k3(d: float) -> float:
    """Return exp(-d) - 1 + d, with the tangent of exp above 20."""
    return bounded_exp(-d) - 1.0 + d


def anchor(case: Case, s: CaseSequence) -> list[float]:
    """Return what ratios are taken against."""
    return list(s.old_logprobs if case.with_old else s.rollout_logprobs)


def trained_tokens(case: Case) -> list[tuple[float, float, float]]:
    """Return log-ratio to the anchor, advantage and log-ratio to the reference of every trained token."""
    return [
        (s.logprobs[j] - anchor(case, s)[j], s.advantages[j], s.logprobs[j] - s.ref_logprobs[j])
        for s in case.sequences
        for j in s.trained()
    ]


def of_ratios(case: Case, low: float, high: float, dual: float) -> dict[str, float]:
    """Return the metrics of a clipped policy loss."""
    tokens = trained_tokens(case)
    ratios = [(bounded_exp(d), a) for d, a, _ in tokens]
    return {
        "ratio": average(r for r, _ in ratios),
        "ratio_largest": max((r for r, _ in ratios), default=-math.inf),
        "ratio_squared": average(r * r for r, _ in ratios),
        "ratio_saturated": float(sum(d > 20.0 for d, *_ in tokens)),
        "kl_anchor": average(k3(d) for d, *_ in tokens),
        "kl_ref": average(k3(d) for *_, d in tokens),
        "advantage": average(a for _, a in ratios),
        "advantage_abs": average(abs(a) for _, a in ratios),
        "clip_fraction": average(float((r > high and a > 0) or (r < low and a < 0)) for r, a in ratios),
        "dual_clip_fraction": average(float(r > dual and a < 0) for r, a in ratios),
    }


def of_sequence_ratios(case: Case, low: float, high: float, dual: float | None = None) -> dict[str, float]:
    """Return the metrics of a loss with one ratio per sequence, of the mean advantage there."""
    rows = [(s, s.trained()) for s in case.sequences if s.trained()]
    ratios = [
        (bounded_exp(average(s.logprobs[j] - anchor(case, s)[j] for j in at)), average(s.advantages[j] for j in at))
        for s, at in rows
    ]
    return {
        "sequence_ratio": average(s for s, _ in ratios),
        "sequence_ratio_largest": max((s for s, _ in ratios), default=-math.inf),
        "clip_fraction": average(float((s > high and a > 0) or (s < low and a < 0)) for s, a in ratios),
        **({} if dual is None else {"dual_clip_fraction": average(float(s > dual and a < 0) for s, a in ratios)}),
    }


def of_weights(case: Case, weights: list[list[float]], level: str, low: float, high: float) -> dict[str, float]:
    """Return the metrics of a correction, of its weights by sequence and token, and the share of ratios out of its range."""
    flat = [row[j] for s, row in zip(case.sequences, weights, strict=True) for j in s.trained()]
    outside = []
    for s in case.sequences:
        steps = [s.old_logprobs[j] - s.rollout_logprobs[j] for j in s.trained()]
        shared = {"sequence": math.fsum(steps), "geometric": average(steps)}
        ratios = [bounded_exp(step if level == "token" else shared[level]) for step in steps]
        outside += [float(r < low or r > high) for r in ratios]
    return {
        "correction": average(flat),
        "correction_largest": max(flat, default=-math.inf),
        "correction_squared": average(w * w for w in flat),
        "outside": average(outside),
    }


def of_pairs(chosen: list[float], rejected: list[float]) -> dict[str, float]:
    """Return the metrics of the margins between scores."""
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    return {"margin": average(margins), "accuracy": average((m > 0) + 0.5 * (m == 0) for m in margins)}
