"""The losses that have every property, and the cases that suit each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from pullback.losses import (
    CISPO,
    DPO,
    DRO,
    GRPO,
    GSPO,
    KL,
    KTO,
    ORPO,
    PPO,
    ClipRange,
    Correction,
    CrossEntropy,
    ImportanceSampling,
    Loss,
    Rejection,
    SimPO,
)
from pullback.testing import Case, CaseSequence

__all__ = ["IDS", "LOSSES", "away_from_kinks", "suited"]

LOSSES: Final[list[Loss]] = [
    CrossEntropy(),
    CrossEntropy("token_mean"),
    CrossEntropy("group_mean_token_mean"),
    ImportanceSampling(),
    PPO(),
    GRPO(),
    GRPO(kl=KL("k2", gradient="pathwise", importance=False)),
    GRPO(clip=None, anchor="none", aggregation="sequence_mean_token_mean"),
    DPO(),
    DPO(0.5, 0.1),
    ORPO(),
    ORPO(nll="token_mean"),
    SimPO(),
    KTO(),
    KTO(0.5, 2.0, 0.5, "zero"),
    CISPO(),
    DRO(),
    GSPO(0.2),
    GSPO(0.2, "sequence_mean", "sequence"),
    PPO(dual_clip=3.0),
    PPO(correction=Correction.tis()),
    PPO(correction=Correction.tis(5.0, level="sequence", reject=Rejection("k3", "mean", high=0.7))),
    GRPO(kl=0.1, correction=Correction.icepop()),
    CISPO(correction=Correction.geometric(0.5, 2.0)),
]
IDS: Final = [f"{i}-{loss.name}" for i, loss in enumerate(LOSSES)]


def suited(loss: Loss, case: Case) -> Case:
    """The case with what the loss needs of it: the anchor of a correction, one advantage per sequence."""
    if "old_logprobs" in loss.required_inputs:
        case = replace(case, with_old=True)
    if not isinstance(loss, GSPO) or loss.form == "token":
        return case
    return replace(case, sequences=tuple(with_one_advantage(s) for s in case.sequences))


def with_one_advantage(s: CaseSequence) -> CaseSequence:
    first = s.advantages[s.trained()[0]]
    return replace(s, advantages=[first if w else a for a, w in zip(s.advantages, s.weights, strict=True)])


def away_from_kinks(loss: Loss, case: Case) -> bool:
    """True if differences apply: no ratio is near an edge of a clip range, and none is a detached weight."""
    if isinstance(loss, CISPO) or (isinstance(loss, GSPO) and loss.form == "token"):
        return False
    if not isinstance(loss, (PPO, GRPO, GSPO)) or loss.clip is None:
        return True
    clip = ClipRange.of(loss.clip)
    edges = (clip.low, clip.high, loss.dual_clip or clip.high)
    for s in case.sequences:
        anchor = s.old_logprobs if case.with_old else s.rollout_logprobs
        logs = [s.logprobs[j] - anchor[j] for j in s.trained()]
        logs += [math.fsum(logs) / len(logs)]
        if any(abs(math.exp(log) - edge) < 1e-3 for log in logs for edge in edges):
            return False
    return True
