"""The batch: order, layout, splits and normalisation, weights and scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ...cases import COLUMNS, Case, CaseSequence
from ..failures import Failed, NotApplicable
from ..forms import LossUnderTest, Measured
from ..forms.registered import RegisteredUnderTest
from ..results import Property
from .selection import changed, close, single

__all__ = ["BATCHES"]

_TIGHT: Final = 1e-9
_SIZES: Final[dict[str, Callable[[Case, int], float]]] = {
    "nothing (it is a sum)": lambda case, per: 1.0,
    "trained tokens": lambda case, per: float(sum(len(s.trained()) for s in case.sequences)),
    "the sum of the weights": lambda case, per: float(sum(w for s in case.sequences for w in s.weights)),
    "sequences": lambda case, per: float(sum(bool(s.trained()) for s in case.sequences)),
    "pairs": lambda case, per: len(case.sequences) / 2,
    "groups": lambda case, per: float(len({s.group for s in case.sequences if s.trained()})),
    "rows": lambda case, per: float(len(case.sequences)),
}


def _units(case: Case, per: int) -> list[list[int]]:
    return [list(range(i, i + per)) for i in range(0, len(case.sequences), per)]


def _permutation(under_test: LossUnderTest, case: Case) -> None:
    units = _units(case, under_test.unit())
    if len(units) < 2:
        return
    base = under_test.measure(case)
    for order in (units[::-1], [*units[1:], units[0]]):
        indices = [i for unit in order for i in unit]
        other = under_test.measure(case.subset(indices))
        _same(
            base,
            other,
            indices,
            f"in the order {indices}",
            "the order of the sequences matters: state between rows, or means over parts of the batch",
        )


def _pairs_by_id(under_test: LossUnderTest, case: Case) -> None:
    inputs = under_test.inputs if isinstance(under_test, RegisteredUnderTest) else ()
    if "pair_id" not in inputs:
        raise NotApplicable("it takes no pair_id")
    named = [replace(s, pair_id=7 - i // 2, role=1 - i % 2) for i, s in enumerate(case.sequences)]
    base, count = under_test.measure(case), len(named)
    for order in (list(range(count)), list(range(count))[::-1], [*range(0, count, 2), *range(1, count, 2)]):
        other = under_test.measure(replace(case, sequences=tuple(named[i] for i in order)))
        _same(
            base,
            other,
            order,
            f"with pair_id and role, in the order {order}",
            "pairs are taken by position, not by pair_id and role",
        )


def _layouts(under_test: LossUnderTest, case: Case) -> None:
    if len(under_test.layouts) < 2:
        raise NotApplicable("it has one layout")
    base, everything = under_test.measure(case), list(range(len(case.sequences)))
    _, *others = under_test.layouts
    words = {"wide": "with three more columns of padding", "left": "padded on the left", "list": "as a list of datums"}
    causes = {
        "wide": "the width of the padding matters: a mean over all positions of the tensor, padding included",
        "left": "positions are counted from the left, padding included",
    }
    for layout in others:
        other = under_test.measure(case, layout=layout)
        tolerance = 1e-4 if layout == "list" else _TIGHT  # datums carry fp32
        _same(base, other, everything, words.get(layout, layout), causes.get(layout), tolerance)


def _same(
    base: Measured, other: Measured, order: list[int], words: str, cause: str | None, tolerance: float = _TIGHT
) -> None:
    if not close(base.value, other.value, tolerance):
        raise Failed(f"{words} the loss is {other.value:.8g} instead of {base.value:.8g}", cause)
    expected = torch.cat([base.rows[i] for i in order])
    wrong = changed(expected, other.flat, tolerance, 1e-3)
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0])
        raise Failed(f"{words} a gradient is {float(other.flat[k]):.8g} instead of {float(expected[k]):.8g}", cause)


def _splits(under_test: LossUnderTest, case: Case) -> str | None:
    if under_test.declared == "batch":
        raise NotApplicable("it declares that it depends on the whole batch")
    case, pieces = _cut(case)
    if isinstance(under_test, RegisteredUnderTest):
        return _parts(under_test, case, pieces)
    whole, parts = under_test.measure(case), [under_test.measure(piece) for piece in pieces]
    per = under_test.unit()
    fitting = []
    for name, size in _SIZES.items():
        total, sizes = size(case, per), [size(piece, per) for piece in pieces]
        if _adds_up(whole, parts, [n / total for n in sizes]):
            fitting.append(name)
        squares = [(n / total) ** 2 for n in sizes]
        if not fitting and not name.startswith("nothing") and len({*sizes}) > 1 and _adds_up(whole, parts, squares):
            raise Failed(f"cut in two, the parts count by the square of their {name}", f"it is divided by {name} twice")
    if not fitting:
        raise Failed(
            "cut in two, the gradient is no weighted sum of its parts, by any count of tokens, weights, sequences or pairs",
            "a mean of means over parts of the batch, or statistics of the batch",
        )
    return (
        None if fitting[0].startswith("nothing") else f"divided by {' or '.join(fitting)}: give the whole step's count"
    )


def _cut(case: Case) -> tuple[Case, list[Case]]:
    """Return a case of whole groups, and its groups, which differ in their numbers of trained tokens."""
    sequences = [replace(s, group=i // 2) for i, s in enumerate(case.sequences)]
    sequences = sequences if len(sequences) > 2 else [*sequences, *(_longer(s) for s in sequences)]
    sequences = sequences if len(sequences) % 2 == 0 else sequences[:-1]
    counts = [len(s.trained()) for s in sequences]
    if len({sum(counts[i : i + 2]) for i in range(0, len(counts), 2)}) == 1:
        sequences[0] = _longer(sequences[0])  # parts of one size would hide what they are divided by
    whole = replace(case, sequences=tuple(replace(s, group=i // 2) for i, s in enumerate(sequences)))
    return whole, [whole.subset([i, i + 1]) for i in range(0, len(sequences), 2)]


def _longer(s: CaseSequence) -> CaseSequence:
    columns: dict[str, Any] = {name: [*getattr(s, name), *getattr(s, name)] for name in COLUMNS}
    return replace(s, **columns)


def _adds_up(whole: Measured, parts: list[Measured], shares: list[float]) -> bool:
    expected = torch.cat([part.flat * share for part, share in zip(parts, shares, strict=True)])
    return not bool(changed(whole.flat, expected, _tolerance(whole.flat, *(part.flat for part in parts))).any())


def _tolerance(*gradients: Tensor) -> float:
    """Return by how much sums of gradients may differ: those of single precision by more."""
    return 1e-5 if all(single(gradient) for gradient in gradients) else 1e-7


def _parts(under_test: RegisteredUnderTest, case: Case, pieces: list[Case]) -> str | None:
    whole, *others = (under_test.output(each) for each in (case, *pieces))
    for k, part in enumerate(whole.parts):
        numerator = sum(float(o.parts[k].numerator.detach()) for o in others)
        if not math.isclose(numerator, float(part.numerator.detach()), rel_tol=1e-9, abs_tol=1e-9):
            raise Failed(
                f"cut in two, the numerators of {part.name} add up to {numerator:.6g} instead of {float(part.numerator):.6g}",
                "the numerator is divided by something of the batch: a mean of means",
            )
        count = sum(float(o.parts[k].count) for o in others) if part.denominator != "none" else 1.0
        if not math.isclose(count, float(part.count), rel_tol=1e-9):
            raise Failed(
                f"cut in two, the {part.denominator} of {part.name} add up to {count:g} instead of {float(part.count):g}",
                None,
            )
    return None


def _weights_once(under_test: LossUnderTest, case: Case) -> str | None:
    s = CaseSequence([-1.25] * 3, [1.0, 2.0, 1.0], [1.0] * 3, [-1.25] * 3, [-1.25] * 3, [-1.5] * 3)
    other = replace(s, logprobs=[-1.5] * 3, rollout_logprobs=[-1.5] * 3, old_logprobs=[-1.5] * 3, weights=[1.0] * 3)
    whole = Case((s, other, other, other), with_old=True)
    rows = under_test.measure(whole).rows
    once, twice = float(rows[0][0]), float(rows[0][1])
    if once == 0.0:
        raise NotApplicable("its tokens have no gradient here")
    ratio = twice / once
    if math.isclose(ratio, 2.0, rel_tol=1e-9):
        return None
    if math.isclose(ratio, 1.0, rel_tol=1e-9):
        if under_test.weighs:
            return "weights are a mask to it: a weight of 2 counts as 1"
        raise NotApplicable("it takes a mask, not weights")
    cause = (
        "the weights are applied twice"
        if math.isclose(ratio, 4.0, rel_tol=1e-6)
        else "the weights act on something else"
    )
    raise Failed(f"a token of weight 2 has {ratio:.4g} times the gradient of its like of weight 1", cause, whole)


def _scale(under_test: LossUnderTest, case: Case) -> str | None:
    if "advantages" not in under_test.fields:
        raise NotApplicable("it takes no advantages")
    if under_test.relative:
        raise NotApplicable("rewards may be normalised")
    none, once, thrice = (
        under_test.measure(case.edited("advantages", lambda i, j, a, k=k: a * k)).flat  # type: ignore[misc]
        for k in (0.0, 1.0, 3.0)
    )
    if bool(none.isnan().any()):
        raise Failed("with advantages of 0 the gradient is NaN", "advantages are divided by their standard deviation")
    found, expected = thrice - none, 3 * (once - none)
    if bool(changed(found, expected, _tolerance(none, once, thrice)).any()):
        if _exponential(under_test, case):
            return "advantages act through an exponential, as in reward-weighted regression"
        grown = float(found.norm() / (once - none).norm())
        cause = (
            "advantages are normalised inside the loss"
            if math.isclose(grown, 1.0, rel_tol=1e-2)
            else "advantages are clamped or used twice"
        )
        raise Failed(f"three times the advantages give {grown:.4g} times the gradient", cause)
    return None


def _exponential(under_test: LossUnderTest, case: Case) -> bool:
    """Return whether small advantages multiply the gradient by an exponential: three times as much is its third power."""
    none, once, thrice = (
        under_test.measure(case.edited("advantages", lambda i, j, a, k=k: 0.05 * a * k)).flat  # type: ignore[misc]
        for k in (0.0, 1.0, 3.0)
    )
    trained = torch.tensor([w != 0 for s in case.sequences for w in s.weights])
    alive = bool((none[trained] != 0).all())
    return alive and not bool(changed(thrice * none.square(), once**3, 1e-6).any())


BATCHES = (
    Property(
        "permutation",
        "The order of the sequences, or of the pairs, has no effect.",
        ("state between rows",),
        _permutation,
    ),
    Property(
        "pairs_by_id",
        "Pairs are found by pair_id and role, wherever they stand.",
        ("pairs are taken by position",),
        _pairs_by_id,
    ),
    Property(
        "layouts",
        "Padded, packed and list, padding on the left and on the right, give the same.",
        ("the padding is counted",),
        _layouts,
    ),
    Property(
        "splits",
        "The parts of a batch add up to it: gradients over one count, and the counts themselves.",
        ("a mean of means", "statistics of the batch"),
        _splits,
    ),
    Property("weights_once", "A weight is applied once.", ("the weights are applied twice",), _weights_once, "none"),
    Property(
        "scale",
        "The gradient is proportional to the advantages.",
        ("advantages are normalised inside the loss",),
        _scale,
    ),
)
