"""What is not trained: it has no gradient and no effect, whatever stands there and however much of it there is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

from ...cases import COLUMNS, Case, CaseSequence
from ..failures import Failed, NotApplicable
from ..forms import LossUnderTest, Measured
from ..results import Property
from .selection import changed, close

__all__ = ["MASKING"]

_SELECTED_LATE: Final = (
    "what is masked was selected after it was computed: the value is right, but the backward multiplies 0 by NaN; select every "
    "input with torch.where first"
)
_LENGTH: Final = (
    "the length of the whole text counts, prompt included: a mean over len(logprobs), or over an attention_mask"
)


def _untrained(under_test: LossUnderTest, case: Case) -> None:
    base = under_test.measure(case)
    for i, s in enumerate(case.sequences):
        for j, w in enumerate(s.weights):
            slope = float(base.rows[i][j])
            if w == 0 and slope != 0.0:
                raise Failed(f"untrained token {j} of sequence {i} has gradient {slope:.4g}", _masked_how(under_test))
    _no_effect(under_test, case, base, 3.25, "another number")
    _longer_prompts(under_test, case, base)


def _longer_prompts(under_test: LossUnderTest, case: Case, base: Measured) -> None:
    """Check that more untrained tokens before the trained ones and after them change nothing."""
    longer = replace(case, sequences=tuple(_between_untrained(s) for s in case.sequences))
    rows = under_test.measure(longer).rows
    for i, row in enumerate(rows):
        wrong = changed(base.rows[i], row[1:-1], 1e-7, 1e-3).nonzero().flatten().tolist()
        if wrong:
            found, expected = (float(x[wrong[0]]) for x in (row[1:-1], base.rows[i]))
            raise Failed(
                f"with one more untrained token before each sequence and one after it token {wrong[0]} of sequence {i} has "
                f"gradient {found:.4g} instead of {expected:.4g}",
                _masked_how(under_test) if any(bool(x[[0, -1]].any()) for x in rows) else _LENGTH,
            )


def _between_untrained(s: CaseSequence) -> CaseSequence:
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        column = list(getattr(s, name))
        columns[name] = [0.0, *column, 0.0] if name == "weights" else [column[0], *column, column[-1]]
    return replace(s, **columns)


def _masked_how(under_test: LossUnderTest) -> str:
    """Return what is wrong with a mask, seen where one token of four is trained."""
    at, anchor = [-1.0, -1.25, -1.5, -2.0], [-1.5] * 4
    row = CaseSequence(at, [0.0, 1.0, 0.0, 0.0], [1.0] * 4, anchor, anchor, [-1.75] * 4)
    case = Case((row,) * (2 * under_test.unit()), with_old=True)
    places = {j for x in under_test.measure(case).rows for j in x.nonzero().flatten().tolist()}
    if len(places) == 4:
        return "there is no mask, or it is that of the whole text (an attention_mask): the prompt is trained too"
    if places in ({0}, {2}):
        return "the mask is shifted by one token"
    return "the mask is not applied to every term"


def _poison(under_test: LossUnderTest, case: Case) -> None:
    if not under_test.poisonable:
        raise NotApplicable("masking is not up to this function")
    base = under_test.measure(case)
    for value in (math.nan, math.inf):
        poisoned = Case(case.sequences, case.with_old, math.nan)
        _no_effect(under_test, poisoned, base, value, str(value), _let_through(under_test, case, base))


def _let_through(under_test: LossUnderTest, case: Case, base: Measured) -> str | None:
    """Return why a NaN gets through, where a plain number does too; None where it is the mask that multiplies."""
    rows = zip(base.rows, case.sequences, strict=True)
    if any(float(row[j]) != 0.0 for row, s in rows for j, w in enumerate(s.weights) if w == 0):
        return f"{_masked_how(under_test)}; `untrained` says more"
    return None


def _no_effect(
    under_test: LossUnderTest, case: Case, base: Measured, value: float, words: str, cause: str | None = None
) -> None:
    weights = [list(s.weights) for s in case.sequences]
    for field in ("logprobs", *under_test.fields):
        junk = -value if field == "logprobs" else value
        case = case.edited(field, lambda i, j, x, junk=junk: x if weights[i][j] else junk)  # type: ignore[misc]
    other = under_test.measure(case)
    if not close(other.value, base.value):
        raise Failed(
            f"with {words} at the untrained tokens and in the padding the loss is {other.value:.6g} instead of "
            f"{base.value:.6g}",
            cause,
        )
    places = [(i, j) for i, s in enumerate(case.sequences) for j in range(len(s.logprobs))]
    for k in changed(other.flat, base.flat).nonzero().flatten().tolist():
        i, j = places[k]
        which = "trained" if case.sequences[i].weights[j] else "untrained"
        raise Failed(
            f"with {words} at the untrained tokens and in the padding the {which} token {j} of sequence {i} has gradient "
            f"{float(other.flat[k]):.4g} instead of {float(base.flat[k]):.4g}",
            cause if cause or words == "another number" else _SELECTED_LATE,
        )


MASKING = (
    Property(
        "untrained",
        "A token of weight 0 has no gradient, and its numbers have no effect.",
        ("a mean over all positions, trained or not", "a mask is missing in one of the terms"),
        _untrained,
    ),
    Property(
        "poison",
        "NaN and inf at untrained tokens and in the padding have no effect.",
        ("a mask that multiplies: 0 * NaN is NaN; select with torch.where, before anything is computed",),
        _poison,
    ),
)
