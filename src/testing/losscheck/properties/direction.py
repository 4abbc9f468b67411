"""The direction of the gradient: what is good becomes more likely."""

from __future__ import annotations

import math
from dataclasses import replace

from ...cases import Case
from ..failures import Failed, NotApplicable
from ..forms import LossUnderTest
from ..invariance import centred
from .pulls import pulls, turned_how

__all__ = ["direction"]


def direction(under_test: LossUnderTest, case: Case) -> str | None:
    """Check that minimising the loss makes what is good more likely; return how that was decided, if not by the plain sign."""
    knows = "advantages" in under_test.fields or under_test.paired or under_test.labelled
    if not knows and under_test.fields:
        raise NotApplicable("what is to become more likely is not known")
    if under_test.relative and not under_test.grouped:
        raise NotApplicable("rewards are good or bad by a baseline that is not known")
    case = _with_clear_signs(case)
    measured = under_test.measure(case)
    advantages = centred(case) if under_test.relative else _first_of_each(under_test, case)
    # The strongest gradient decides what counts as one: regularisers are weaker.
    floor = 1e-3 * float(measured.flat.abs().max())
    note = None
    for i, s in enumerate(case.sequences):
        for j in s.trained():
            good, slope = _good(under_test, case, (i, j), advantages), float(measured.rows[i][j])
            if slope * good <= floor:
                continue
            if not _follows_advantage(under_test, case, (i, j), slope):
                raise _wrong_direction(under_test, i, j, good, slope)
            note = (
                "by how the gradient changes with the advantage: a baseline, or an exponential of it, decides the sign"
            )
    return pulls(under_test, case) or note


def _with_clear_signs(case: Case) -> Case:
    """Return a case with advantages of 1 or more, weights of 1 and a reference that is the policy: nothing else has a sign."""
    case = case.edited("advantages", lambda i, j, a: math.copysign(max(abs(a), 1.0), a))
    sequences = [
        replace(s, ref_logprobs=s.logprobs, weights=[float(w != 0) for w in s.weights]) for s in case.sequences
    ]
    return replace(case, sequences=tuple(sequences))


def _wrong_direction(under_test: LossUnderTest, sequence: int, token: int, good: float, slope: float) -> Failed:
    wish, does = ("more", "less") if good > 0 else ("less", "more")
    turned = "the sign of the loss is turned around"
    cause = f"{turned}, or chosen and rejected are swapped" if under_test.paired else turned_how(under_test) or turned
    return Failed(
        f"token {token} of sequence {sequence} should become {wish} likely ({_why(under_test, good)}), but with its gradient "
        f"of {slope:.4g} minimising the loss makes it {does} likely",
        cause,
    )


def _first_of_each(under_test: LossUnderTest, case: Case) -> list[float]:
    """Return the one advantage of each sequence; nothing, if each token has its own."""
    if "advantages" not in under_test.per_sequence:
        return []
    return [s.advantages[s.trained()[0]] for s in case.sequences]


def _good(under_test: LossUnderTest, case: Case, place: tuple[int, int], advantages: list[float]) -> float:
    s = case.sequences[place[0]]
    if "advantages" in under_test.fields:
        return advantages[place[0]] if advantages else s.advantages[place[1]]
    if under_test.labelled:
        return 1.0 if s.label else -1.0
    return -1.0 if under_test.paired and place[0] % 2 else 1.0


def _follows_advantage(under_test: LossUnderTest, case: Case, place: tuple[int, int], slope: float) -> bool:
    """Return whether a token becomes more likely where its own advantage alone is larger, whatever its sign."""
    if "advantages" not in under_test.fields:
        return False
    whole = "advantages" in under_test.per_sequence
    raised = case.edited("advantages", lambda i, j, a: a + 0.1 if i == place[0] and (whole or j == place[1]) else a)
    return float(under_test.measure(raised).rows[place[0]][place[1]]) < slope - 1e-6 * abs(slope)


def _why(under_test: LossUnderTest, good: float) -> str:
    if "advantages" in under_test.fields:
        return f"advantage {good:g}"
    if under_test.paired:
        return "chosen" if good > 0 else "rejected"
    return "it is trained" if good > 0 else "its label is 0"
