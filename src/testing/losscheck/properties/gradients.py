"""The gradient: of the value, of a closed form, of the declared kind, downhill, and of nothing but the log-probs."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from ....losses.kind import wider
from ...cases import Case
from ..detached import Detached, DetachedPartsVary
from ..failures import Failed, NotApplicable
from ..forms import LossUnderTest
from ..forms.measured import kind_case, leaves_of
from ..results import Property
from .direction import direction

__all__ = ["GRADIENTS"]

_PLACES: Final = 6  # tokens of a batch at which differences are taken
_STEP: Final = 1e-5  # nats
_COARSE: Final = 2e-2  # nats, where a loss computes in single precision


def _differences(under_test: LossUnderTest, case: Case) -> str | None:
    gradient = under_test.measure(case).flat
    detached = Detached()
    try:
        with detached.record():
            under_test.value(case)
        with detached.hold():
            under_test.value(case)
    except DetachedPartsVary:
        detached = Detached()
    flat = _positions(case)
    places = _spread([(i, j) for i, s in enumerate(case.sequences) for j in s.trained()])
    gradients = {place: float(gradient[flat[place]]) for place in places}
    slopes = {place: _slope(under_test, case, place, gradients[place], detached) for place in places}
    for (i, j), (slope, agrees) in slopes.items():
        if not agrees:
            raise Failed(
                f"token {j} of sequence {i} has gradient {gradients[i, j]:.6g}, but the value rises by {slope:.6g} per nat"
                + (" (with what is detached held fixed)" if detached.parts else ""),
                _cause([gradients[p] for p in places], [slopes[p][0] for p in places]),
            )
    if not detached.parts or all(_slope(under_test, case, p, gradients[p], Detached())[1] for p in places[:2]):
        return None
    return "with what is detached held fixed; the value itself has another slope"


def _spread(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return some of the places, the first and the last among them."""
    if len(places) <= _PLACES:
        return places
    return [places[k * (len(places) - 1) // (_PLACES - 1)] for k in range(_PLACES)]


def _slope(
    under_test: LossUnderTest, case: Case, place: tuple[int, int], gradient: float, detached: Detached
) -> tuple[float, bool]:
    """Return the slope of the value at a token, and whether the gradient is it (at a kink: lies between both sides')."""
    behind = ahead = math.nan
    for step, tolerance in ((_STEP, 1e-5), (_COARSE, 3e-3)):
        single = _single(gradient) or all(_single(x) for x in (behind, ahead))
        if step == _COARSE and not (single or _noisy(under_test, case, place, detached)):
            break
        behind, ahead = (_value(under_test, case, place, step * k, detached) for k in (-1, 1))
        central = (ahead - behind) / (2 * step)
        rounding = (1e-15 if step == _STEP else 2e-7) * max(abs(ahead), 1.0) / step
        allowed = tolerance * max(abs(central), abs(gradient)) + 10 * rounding
        if abs(central - gradient) <= allowed:
            return central, True
        at = _value(under_test, case, place, 0.0, detached)
        left, right = (at - behind) / step, (ahead - at) / step
        low, high = min(left, right), max(left, right)
        steepest = max(abs(low), abs(high))
        slack = allowed + step * steepest  # a side may be curved
        if high - low > 1e-2 * steepest and low - slack <= gradient <= high + slack:
            return central, True
    return central, False


def _noisy(under_test: LossUnderTest, case: Case, place: tuple[int, int], detached: Detached) -> bool:
    """Return whether differences over small steps disagree: a part of the value is computed in single precision."""

    def slope(step: float) -> float:
        behind, ahead = (_value(under_test, case, place, by, detached) for by in (-step, step))
        return (ahead - behind) / (2 * step)

    slopes = [slope(_STEP * k) for k in (1, 2, 3, 5)]
    return max(slopes) - min(slopes) > 1e-6 * max(map(abs, slopes))


def _value(under_test: LossUnderTest, case: Case, place: tuple[int, int], by: float, detached: Detached) -> float:
    moved = case.edited("logprobs", lambda i, j, x: x + by if (i, j) == place else x)
    context: AbstractContextManager[None] = detached.hold() if detached.parts else nullcontext()
    try:
        leaves = leaves_of(moved)
        with context:
            loss = under_test.value(moved, leaves)
        return float(loss.detach())
    except DetachedPartsVary:
        return math.nan


def _single(x: float) -> bool:
    return float(torch.tensor(x, dtype=torch.float32)) == x


def _cause(gradients: list[float], slopes: list[float]) -> str | None:
    g, s = torch.tensor(gradients, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)
    if not bool(s.isfinite().all()):
        return "what is detached changes from call to call, or the value is not finite"
    if bool((g == 0).all()) and g.numel() > 1:
        return "no gradient flows: a detach, no_grad or clamp too many"
    if _close(g, -s):
        return "the sign of the gradient is turned around"
    factors = (g / s)[s != 0]
    if factors.numel() and factors[0] != 0 and _close(g, s * factors[0]):
        return (
            f"the gradient is {float(factors[0]):.4g} times what it should be: a factor is applied in the backward only"
        )
    if g.numel() > 2 and (_close(g[1:], s[:-1]) or _close(g[:-1], s[1:])):
        return "the gradient is shifted by one token"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-8)


def _positions(case: Case) -> dict[tuple[int, int], int]:
    places = [(i, j) for i, s in enumerate(case.sequences) for j in range(len(s.logprobs))]
    return {place: k for k, place in enumerate(places)}


def _closed_form(under_test: LossUnderTest, case: Case) -> None:
    if under_test.expected is None:
        raise NotApplicable("no closed form is given (expected=)")
    found = under_test.measure(case).flat
    expected = torch.tensor([x for row in under_test.expected(case) for x in row], dtype=torch.float64)
    wrong = (~torch.isclose(found, expected, rtol=1e-6, atol=1e-9)).nonzero().flatten().tolist()
    if not wrong:
        return
    i, j = next(place for place, k in _positions(case).items() if k == wrong[0])
    raise Failed(
        f"token {j} of sequence {i} has gradient {float(found[wrong[0]]):.6g}, not {float(expected[wrong[0]]):.6g}",
        _cause(found.tolist(), expected.tolist()),
    )


def _kind(under_test: LossUnderTest, case: Case) -> str:
    measured, declared = under_test.kind, under_test.declared
    if measured is None:
        raise NotApplicable("the loss refuses the numbers of the measurement")
    if declared is None:
        return f"{measured!r} is measured; none is declared"
    if not wider(declared, measured):
        depends = {
            "token": "its own log-prob",
            "sequence": "its sequence",
            "pair": "its pair",
            "batch": "the whole batch",
        }
        raise Failed(
            f"{declared!r} is declared, but the gradient of a token depends on {depends[measured]}",
            f"declare {measured!r}: a backend that streams would train something else",
            kind_case(False),
        )
    return (
        f"{measured!r}"
        if measured == declared
        else f"{measured!r} is measured; {declared!r} is declared, which is safe"
    )


def _constants(under_test: LossUnderTest, case: Case) -> None:
    if not under_test.detached:
        raise NotApplicable("no input is declared as detached (detached=)")
    layout = "padded" if "padded" in under_test.layouts else under_test.layouts[0]
    watched: dict[str, Tensor] = {}
    leaves = leaves_of(kind_case(False))
    arguments = under_test.with_gradients(kind_case(False), leaves, layout, watched)
    loss = under_test.loss_of(arguments)
    names = list(watched)
    for name, slope in zip(names, torch.autograd.grad(loss, list(watched.values()), allow_unused=True), strict=True):
        if slope is not None and bool((slope != 0).any()):
            raise Failed(
                f"a gradient flows into {name}, the largest entry is {float(slope.abs().max()):.4g}",
                f"{name} is not detached: where it was computed from the policy, that is trained through it",
                kind_case(False),
            )


GRADIENTS = (
    Property(
        "differences",
        "The gradient is the slope of the value, with detached parts held fixed; at a kink it lies between both sides.",
        ("a backward of one's own is wrong", "a factor is applied after the value was taken"),
        _differences,
    ),
    Property(
        "closed_form",
        "The gradient is the one that is expected.",
        ("a detach is missing", "a term is wrong"),
        _closed_form,
    ),
    Property(
        "kind",
        "The gradient of a token depends on no more than is declared.",
        ("the wrong kind is declared",),
        _kind,
        "none",
    ),
    Property(
        "direction",
        "Minimising makes tokens of positive advantage, chosen and trained ones more likely, and the others less; a clip, a "
        "ratio and a KL pull to their right side.",
        ("the sign of the loss is turned around", "chosen and rejected are swapped"),
        direction,
        "on_policy",
    ),
    Property(
        "constants",
        "No gradient flows into what is no log-prob of the policy.",
        ("a detach is missing",),
        _constants,
        "none",
    ),
)
