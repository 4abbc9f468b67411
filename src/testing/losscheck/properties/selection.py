"""Which tokens and inputs count: every trained one, and each only where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from ...cases import Case
from ..failures import Failed, NotApplicable
from ..forms import LossUnderTest, Measured
from ..forms.base import ANCHORS
from ..forms.measured import kind_case
from ..invariance import centred
from ..results import Property

__all__ = ["ALIGNMENT", "SELECTION", "changed", "close", "single"]

_SINGLE: Final = 1e-5
_ODD: Final = 0.0371  # nats; a move that no clip range, grid or cancellation is made for
_AWAY: Final = (-2.5, 1.0)  # nats, of an anchor: ratios of 12 and 0.37, which a filter of ordinary width leaves out


def single(x: Tensor) -> bool:
    """Return whether numbers may come from fp32 arithmetic: their last bits are noise then."""
    return bool((x.float().double() == x).all())


def close(a: float, b: float, tolerance: float = 1e-12) -> bool:
    """Return whether two losses are equal but for rounding."""
    if single(torch.tensor([a, b], dtype=torch.float64)):
        tolerance = max(tolerance, _SINGLE)
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def changed(a: Tensor, b: Tensor, tolerance: float = 1e-9, floor: float = 0.0) -> Tensor:
    """Return where two gradients differ by more than rounding; NaN differs from everything but itself."""
    if single(a) and single(b):
        tolerance = max(tolerance, _SINGLE)
    size = max([floor, *(float(x.nan_to_num().abs().max()) for x in (a, b) if x.numel())])
    same_nan = a.isnan() & b.isnan()
    return ~(((a - b).abs() <= tolerance * size) | same_nan)


def _influence(under_test: LossUnderTest, case: Case) -> None:
    dead = _dead(under_test, case)
    for moved in _elsewhere(under_test, case) if dead else ():
        dead = [place for place in dead if place in _dead(under_test, moved)]
    if under_test.relative:  # a reward that is its group's mean says nothing
        advantages = centred(case if under_test.grouped else _one_group(case))
        dead = [(i, j) for i, j in dead if abs(advantages[i]) > 1e-9]
    if not dead:
        return
    i, j = dead[0]
    raise Failed(
        f"trained token {j} of sequence {i} has no gradient, on policy and with an advantage", _dropped(under_test)
    )


def _elsewhere(under_test: LossUnderTest, case: Case) -> Iterator[Case]:
    """Yield cases in which what has no gradient for a good reason has one: its place is not to blame then."""
    # Terms may cancel by accident.
    yield case.edited("advantages", lambda i, j, a: a + _ODD).edited("ref_logprobs", lambda i, j, x: x - _ODD)
    yield _lower(case, lambda i: _ODD)
    # A hinge may be content with a pair, or with a likely token.
    yield _lower(case, lambda i: 4.0 * (i % 2 == 0))
    # A baseline that is taken over the group says nothing of a sequence that is alone.
    if not under_test.paired:
        others = tuple(replace(s, advantages=[a + 1.0 for a in s.advantages]) for s in case.sequences)
        yield replace(case, sequences=(*case.sequences, *others))


def _lower(case: Case, by: Callable[[int], float]) -> Case:
    """Return a case with the log-probs of each sequence, and those of its anchors, that much lower."""
    for name in ("logprobs", *ANCHORS):
        case = case.edited(name, lambda i, j, x: x - by(i))
    return case


def _one_group(case: Case) -> Case:
    return replace(case, sequences=tuple(replace(s, group=0) for s in case.sequences))


def _dropped(under_test: LossUnderTest) -> str | None:
    """Return which tokens are dropped, seen where sequences have more than one."""
    case = kind_case(True)
    silent = [i for i, row in enumerate(under_test.measure(case).rows) if not bool((row != 0).any())]
    if silent and silent == list(range(silent[0], len(case.sequences))) and silent[0] > 0:
        return f"only the first {silent[0]} sequences are read, and the others ignored"
    if under_test.paired and silent in ([0, 2], [1, 3]):
        return f"the {'rejected' if silent[0] else 'chosen'} responses are detached, or left out"
    if not silent and "advantages" in under_test.fields and not under_test.relative:
        worse = case.edited("advantages", lambda i, j, a: -a)
        if len(_dead(under_test, worse)) == sum(len(s.logprobs) for s in worse.sequences):
            return "nothing is learnt from negative advantages: a clamp at 0"
    long = {i: len(s.logprobs) for i, s in enumerate(case.sequences) if len(s.logprobs) > 1}
    dead = {(i, j) for i, j in _dead(under_test, case) if i in long}
    if dead == {(i, n - 1) for i, n in long.items()}:
        return "the last token is dropped: a slice [:-1], a shift of the mask, or a range that ends one early"
    if dead == {(i, 0) for i in long}:
        return "the first token is dropped: a slice [1:], or a shift of the log-probs"
    if len(dead) == sum(long.values()):
        return "no gradient flows at all: a detach, no_grad or clamp too many"
    return None


def _dead(under_test: LossUnderTest, case: Case) -> list[tuple[int, int]]:
    rows = under_test.measure(case).rows
    return [(i, j) for i, s in enumerate(case.sequences) for j in s.trained() if float(rows[i][j]) == 0.0]


def _inputs(under_test: LossUnderTest, case: Case) -> str | None:
    silent = [field for field in under_test.fields if not _felt(under_test, field)]
    needed = [field for field in silent if field in under_test.required]
    if needed:
        raise Failed(f"{needed[0]} change neither the value nor the gradient nor a metric", None, kind_case(False))
    if under_test.counts:
        _counted(under_test)
    return f"{', '.join(silent)} without influence, with these defaults" if silent else None


def _felt(under_test: LossUnderTest, field: str) -> bool:
    """Return whether a field has an influence on or near the policy, with advantages of either sign, or filters."""
    for case in (kind_case(True), kind_case(False)):
        for sign in (1.0, -1.0):
            signed = case.edited("advantages", lambda i, j, a, sign=sign: sign * a)  # type: ignore[misc]
            if under_test.matters(signed, field):
                return True
    return field in ANCHORS and any(_filters(under_test, field, by) for by in _AWAY)


def _filters(under_test: LossUnderTest, field: str, by: float) -> bool:
    """Return whether a sequence that is far from one anchor is left out."""
    case = kind_case(True)
    far = case.edited(field, lambda i, j, x: x + by if i == 0 else x)
    near, left_out = (under_test.measure(each).rows[0] for each in (case, far))
    return bool((near != 0).any()) and not bool((left_out != 0).any())


def _counted(under_test: LossUnderTest) -> None:
    """Check that a loss that is told how many tokens the step trains makes use of it."""
    case = kind_case(False)
    few, many = (under_test.measure(case, step=step) for step in (1, 3))
    if few.value == many.value and torch.equal(few.flat, many.flat):
        raise Failed(
            f"{' and '.join(under_test.counts)} change neither the value nor the gradient: of a step with three times as many "
            "tokens the loss is the same",
            "it divides by a count of its own: with several micro-batches to a step each then counts as a whole step, and a "
            "short one as much as a long one",
            case,
        )


def _alignment(under_test: LossUnderTest, case: Case) -> None:
    kind = under_test.kind
    if kind in (None, "batch"):
        raise NotApplicable("the gradient of every token depends on the whole batch")
    fields = [field for field in under_test.fields if field not in under_test.per_sequence]
    if not fields:
        raise NotApplicable("it reads nothing per token")
    base = under_test.measure(case)
    for field in fields:
        for i, s in enumerate(case.sequences):
            for j in {*s.trained()[:1], *s.trained()[-1:]}:
                _stays(under_test, case, base, field, (i, j))


def _stays(under_test: LossUnderTest, case: Case, base: Measured, field: str, place: tuple[int, int]) -> None:
    moved = case.edited(field, lambda i, j, x: x + _ODD if (i, j) == place else x)
    rows = under_test.measure(moved).rows
    own = bool(changed(rows[place[0]], base.rows[place[0]], 1e-7)[place[1]])
    for k, row in enumerate(rows):
        for t in changed(row, base.rows[k], 1e-7).nonzero().flatten().tolist():
            if _within(under_test.kind or "batch", (k, t), place):
                continue
            same = k == place[0]
            if same and abs(t - place[1]) == 1 and not own:
                cause = f"{field} are shifted by {t - place[1]:+d} against the log-probs"
            elif len(rows) > 1 and all(changed(a, b, 1e-7).any() for a, b in zip(rows, base.rows, strict=True)):
                cause = f"{field} are normalised, centred or averaged over the whole batch"
            else:
                cause = f"{field} of one {'token' if same else 'sequence'} are used for another"
            raise Failed(
                f"{field} of token {place[1]} of sequence {place[0]} change the gradient of token {t} of sequence {k}",
                cause,
            )


def _within(kind: str, a: tuple[int, int], b: tuple[int, int]) -> bool:
    if kind in ("constant", "token"):
        return a == b
    return a[0] == b[0] if kind == "sequence" else a[0] // 2 == b[0] // 2


SELECTION = (
    Property(
        "influence",
        "Every trained token, the first and the last too, has a gradient.",
        ("a slice or a shift drops tokens",),
        _influence,
        "on_policy",
    ),
    Property(
        "inputs",
        "Every input that is asked for has an influence.",
        ("it is read and not used", "a term is computed and not added"),
        _inputs,
        "none",
    ),
)
ALIGNMENT = (
    Property(
        "alignment",
        "An input of a token acts on the gradient of that token, or of its sequence or pair.",
        ("a shift by one token",),
        _alignment,
    ),
)
