"""Cal-DPO has every property of a sound loss, and the gradient of its docstring."""

from __future__ import annotations

import math
from typing import ClassVar

from pullback_cal_dpo import CalDPO

from pullback.testing import Case, LossProperties

BETA, CALIBRATION = 0.25, 0.5


def gradient(case: Case) -> list[list[float]]:
    """The gradient in closed form, one list per sequence; chosen and rejected take turns."""
    log_ratios = [
        sum(w * (x - r) for x, r, w in zip(s.logprobs, s.ref_logprobs, s.weights, strict=True) if w)
        for s in case.sequences
    ]
    rows, pairs, target = [], len(log_ratios) // 2, 1 / (2 * BETA)
    for i, s in enumerate(case.sequences):
        chosen, rejected = log_ratios[i - i % 2], log_ratios[i - i % 2 + 1]
        lost = 1 / (1 + math.exp(chosen - rejected))
        slope = (
            (lost + 2 * CALIBRATION * (rejected + target)) if i % 2 else (-lost + 2 * CALIBRATION * (chosen - target))
        )
        rows.append([w * slope / pairs for w in s.weights])
    return rows


class TestCalDPO(LossProperties):
    loss = CalDPO(BETA, CALIBRATION)
    options: ClassVar[dict[str, object]] = {"expected": gradient}
