"""Where the policy has left its anchor or its reference: which side a clip holds back, and where a ratio and a KL pull."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ...cases import Case
from ..failures import Failed
from ..forms import LossUnderTest
from ..forms.base import ANCHORS
from ..forms.measured import kind_case
from .edges import first_token

__all__ = ["pulls", "turned_how"]

_DRIFTS: Final = (0.3, 0.6)  # nats; ratios that ordinary clip ranges hold back on one side
_NEAR: Final = 0.1  # nats; within them
_CLOSE: Final = 0.05
_ONCE: Final = 1.5  # the power of a ratio of which an importance is the first
_FROM_REFERENCE: Final = 0.5
_GROWN: Final = 1.05
_BAND: Final = (
    "a band: tokens that have moved against their advantage have no gradient either, where PPO's min brings them back"
)
_LIKELY, _UNLIKELY = -0.25, -3.0  # nats; exp(x) x has slopes of both signs


def pulls(under_test: LossUnderTest, case: Case) -> str | None:
    """Check a policy loss off policy; of one that is told no advantages nothing is said.

    Args:
        under_test: the loss.
        case: numbers for it, of weights 0 and 1.

    Returns:
        What else to know: that it holds back on both sides, as PPO does not.

    Raises:
        Failed: a clip, a ratio or a KL is turned around.
    """
    if "advantages" not in under_test.fields or under_test.relative or under_test.paired:
        return None
    anchors = [name for name in ANCHORS if name in under_test.fields]
    case = case.edited("logprobs", lambda i, j, x: x - 1.0)  # so that what is above is still a log-prob
    note = None
    if anchors:
        note = _clipped_side(under_test, case)
        _upside_down(under_test, case, anchors[0])
        _twice(under_test, anchors[0])
    if "ref_logprobs" in under_test.fields:
        _reference(under_test, case)
    return note


def turned_how(under_test: LossUnderTest) -> str | None:
    """Return which of some tokens are pushed the wrong way, where that says why; None where all are, or no pattern is seen."""
    if "advantages" not in under_test.fields or under_test.relative:
        return None
    case = kind_case(True).edited("advantages", lambda i, j, a: a if i % 2 else -a)
    for name in ("logprobs", *ANCHORS, "ref_logprobs"):
        case = case.edited(name, lambda i, j, x: _UNLIKELY if j % 2 else _LIKELY)
    rows = under_test.measure(case).rows
    tokens = [(i % 2 == 1, j % 2 == 1, float(x)) for i, row in enumerate(rows) for j, x in enumerate(row)]
    wrong = [(good, unlikely) for good, unlikely, slope in tokens if slope and (slope > 0) == good]
    right = [(good, unlikely) for good, unlikely, slope in tokens if slope and (slope > 0) != good]
    if wrong and right and {good for good, _ in wrong}.isdisjoint(good for good, _ in right):
        return "the sign of the advantages is lost: an abs, a square, or a bound that is the same for both"
    if wrong and right and {unlikely for _, unlikely in wrong}.isdisjoint(unlikely for _, unlikely in right):
        return (
            "a ratio or a probability that multiplies the log-prob is not detached: by its own gradient unlikely tokens are "
            "pushed the other way"
        )
    return None


def _clipped_side(under_test: LossUnderTest, case: Case) -> str | None:
    held = set()
    for advantage in (1.0, -1.0):
        for drift in _DRIFTS:
            back, on = (_off(under_test, case, ANCHORS, advantage, by * advantage) for by in (-drift, drift))
            if bool((back == 0).all()) and bool((on != 0).any()):
                fallen, risen = (f"{math.exp(by * advantage):.2f}" for by in (-drift, drift))
                raise Failed(
                    f"where the policy has moved against advantages of {advantage:g}, to a ratio of {fallen} to its anchor, no "
                    f"gradient brings it back, though there is one where it has moved with them, to {risen}",
                    "the clip holds back the wrong side: the max of the two gains where PPO takes the min, a ratio that is "
                    "upside-down, or one bound for both signs of the advantage",
                )
            held.add(bool((back == 0).all()))
    return _BAND if True in held else None


def _upside_down(under_test: LossUnderTest, case: Case, anchor: str) -> None:
    """Compare the sizes of gradients on both sides of one anchor: with what is only added, a sign decides which is larger."""
    factors = []
    for advantage in (1.0, -1.0):
        below, above = (float(_off(under_test, case, (anchor,), advantage, by).norm()) for by in (_NEAR, -_NEAR))
        factors.append(above / below if below > 0.0 else 0.0)
    if min(factors) > _GROWN:
        raise Failed(
            f"where {anchor} are {_NEAR:g} nats above the policy's log-probs the gradient is {min(factors):.4g} times as large "
            "as where they are as much below, for either sign of the advantage",
            "a ratio is upside-down: what is subtracted is the log-prob of whoever drew the token, exp(logprob - anchor) and "
            "exp(old - rollout)",
        )


def _twice(under_test: LossUnderTest, anchor: str) -> None:
    """Compare the same of single tokens, for which the ratio of a sequence is the token's own."""
    whole = kind_case(True).edited("logprobs", lambda i, j, x: x - 1.0)
    case = replace(whole, sequences=tuple(first_token(s) for s in whole.sequences))
    factors = []
    for advantage in (1.0, -1.0):
        above, below = (float(_off(under_test, case, (anchor,), advantage, by).norm()) for by in (_CLOSE, -_CLOSE))
        factors.append(math.log(above / below) / (2 * _CLOSE) if above > 0.0 < below else 0.0)
    if min(factors) > _ONCE:
        raise Failed(
            f"a nat between a token's log-prob and {anchor} multiplies its gradient by exp({min(factors):.3g}), for either "
            "sign of the advantage, where its importance is exp(1)",
            "the mismatch counts twice: as a ratio to the sampler, and again in a weight",
            case,
        )


def _reference(under_test: LossUnderTest, case: Case) -> None:
    below, at, above = (
        _off(under_test, case, ("ref_logprobs",), 0.0, by) for by in (-_FROM_REFERENCE, 0.0, _FROM_REFERENCE)
    )
    noise = 1e-6 * torch.stack([below, at, above]).abs().max()
    if bool(((above - at < -noise) & (below - at > noise)).any()):
        raise Failed(
            f"with advantages of 0 a token that is {_FROM_REFERENCE:g} nats likelier than under the reference is made likelier "
            f"still, and one that is as much less likely is made less likely",
            "the sign of the KL is turned around: it is subtracted from the loss, or added to the advantages",
        )


def _off(under_test: LossUnderTest, case: Case, fields: tuple[str, ...], advantage: float, by: float) -> Tensor:
    """Return the gradient of the trained tokens where the policy is ``by`` nats above some of what it is compared with."""
    rows = []
    for s in case.sequences:
        others: dict[str, Any] = dict.fromkeys((*ANCHORS, "ref_logprobs"), s.logprobs)
        moved = {name: [x - by for x in s.logprobs] for name in fields}
        rows.append(replace(s, advantages=[advantage] * len(s.logprobs), **{**others, **moved}))
    found = under_test.measure(replace(case, sequences=tuple(rows)))
    return torch.stack([row[j] for row, s in zip(found.rows, rows, strict=True) for j in s.trained()])
