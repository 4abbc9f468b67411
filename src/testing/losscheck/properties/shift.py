"""Shifts that change nothing: what counts are distances to an anchor, differences within a pair, rewards within a group."""

from __future__ import annotations

from typing import Final

from ...cases import Case
from ..failures import Failed, NotApplicable
from ..forms import LossUnderTest
from ..invariance import MOVES, differs, unweighted
from ..results import Property
from .selection import single

__all__ = ["SHIFT"]

_NATS: Final = (-0.375, -30.0, -300.0)  # on the grid of the cases, so that differences are exact
_PAIRS: Final = (-0.5, -30.0)
_REWARDS: Final = (3.0, -50.0)
_AMOUNTS: Final = {
    "anchors": _NATS,
    "level": _NATS,
    "pair sums": _PAIRS,
    "pair means": _PAIRS,
    "group": _REWARDS,
    "batch": _REWARDS,
}
_WORDS: Final = {
    "anchors": "nats and more on the policy's log-prob of each token, and on all that it is compared with,",
    "level": "nats and more on the log-prob of each token",
    "pair sums": "nats and more on the summed log-probs of both responses of each pair",
    "pair means": "nats and more on the mean log-probs of both responses of each pair",
    "group": "and multiples of it on all rewards of each group",
    "batch": "on all rewards",
}
_CAUSES: Final = {
    "anchors": "log-probs count by themselves: a ratio of probabilities that underflow or have an epsilon added, a clamp on a "
    "log-prob, or a reference that is left out on one side or has the wrong sign",
    "level": "an epsilon inside of a log, or a clamp on the log-prob: unlikely tokens are not learnt, though at ordinary "
    "log-probs the gradient is the same for all",
    "pair sums": "the log-probs of one response count by themselves: a clamp, or an exp that underflows",
    "pair means": "the log-probs of one response count by themselves: a clamp, or an exp that underflows",
    "group": "the baseline is not that of the group: a mean over the whole batch, or groups that are mixed up",
    "batch": "no baseline is subtracted, or it is that of something else",
}


def _shift(under_test: LossUnderTest, case: Case) -> str | None:
    moves = under_test.invariances
    if not moves:
        raise NotApplicable(
            "its gradient changes with the level of the log-probs by themselves; invariant= holds it to a shift"
        )
    case = unweighted(case)
    base = under_test.measure(case).flat
    for name in moves:
        for by in _AMOUNTS[name]:
            other = under_test.measure(MOVES[name](case, by)).flat
            wrong = differs(base, other, 1e-3 if single(base) and single(other) else 1e-6)
            if bool(wrong.any()):
                k = int(wrong.nonzero()[0])
                raise Failed(
                    f"with {by:+g} {_WORDS[name]} a gradient is {float(other[k]):.6g} instead of {float(base[k]):.6g}",
                    _CAUSES[name],
                )
    return ", ".join(moves)


SHIFT = (
    Property(
        "shift",
        "A shift of what is only compared changes nothing: of a token's log-prob and its anchors, of both sides of a pair, of "
        "the rewards of a group.",
        ("log-probs or rewards count by themselves",),
        _shift,
    ),
)
