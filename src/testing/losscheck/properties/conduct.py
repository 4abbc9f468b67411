"""Conduct: the same twice, no state, no input changed, metrics that do no harm, and what a reference is there for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ...cases import Case, CaseSequence
from ..failures import Failed, NotApplicable
from ..forms import LossUnderTest
from ..forms.measured import kind_case, leaves_of
from ..results import Property

__all__ = ["CONDUCT"]

_PROBABILITIES: Final = (0.4, 0.3, 0.2, 0.1)
_REFERENCES: Final = (
    (0.1, 0.2, 0.3, 0.4),
    (0.25, 0.25, 0.25, 0.25),
    (0.45, 0.05, 0.15, 0.35),
)  # above here, below there


def _deterministic(under_test: LossUnderTest, case: Case) -> None:
    first, second = under_test.measure(case), under_test.measure(case)
    if not torch.equal(first.flat, second.flat) or first.value != second.value:
        by = float((first.flat - second.flat).abs().max())
        raise Failed(
            f"called twice, the loss is {first.value:.8g} and {second.value:.8g}, and the gradients differ by {by:.3g}",
            "random numbers inside the loss" if _same_by_seed(under_test, case) else "a state between the calls",
        )


def _same_by_seed(under_test: LossUnderTest, case: Case) -> bool:
    """Return whether two calls agree where torch's random numbers are the same."""
    found = []
    with torch.random.fork_rng(devices=[]):
        for _ in "ab":
            torch.manual_seed(0)
            found.append(under_test.measure(case))
    return torch.equal(found[0].flat, found[1].flat) and found[0].value == found[1].value


def _stateless(under_test: LossUnderTest, case: Case) -> None:
    first = under_test.measure(case)
    for _ in range(2):
        under_test.measure(kind_case(False))
    again = under_test.measure(case)
    if not torch.equal(first.flat, again.flat) or first.value != again.value:
        raise Failed(f"after another batch the loss is {again.value:.8g} instead of {first.value:.8g}", None)


def _pure(under_test: LossUnderTest, case: Case) -> None:
    arguments = under_test.arguments(case, leaves_of(case), under_test.layouts[0])
    tensors = [t for t in _tensors(arguments) if not t.requires_grad]
    before = [t.clone() for t in tensors]
    under_test.call(arguments)
    for tensor, old in zip(tensors, before, strict=True):
        if not torch.equal(tensor.nan_to_num(), old.nan_to_num()):
            raise Failed("an input of the loss has other numbers after the call", None)


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < 4:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        for each in inner:
            yield from _tensors(each, depth + 1)
        if hasattr(value, "loss_fn_inputs"):
            yield from (each.to_torch() for each in dict.values(value.loss_fn_inputs))
        elif hasattr(value, "layout"):
            yield from (each for each in vars(value).values() if isinstance(each, Tensor))


def _metrics(under_test: LossUnderTest, case: Case) -> None:
    for name, value in under_test.metrics(case).items():
        if not isinstance(name, str):
            raise Failed(f"a metric is called {name!r}", "names of metrics are strings")
        if isinstance(value, Tensor) and value.requires_grad:
            raise Failed(
                f"metric {name!r} carries a gradient",
                "it keeps the graph of every step alive: .detach() it, or .item() it",
            )
        if isinstance(value, Tensor) and value.numel() != 1:
            raise Failed(f"metric {name!r} has {value.numel()} numbers", "a metric is one number")
        if not isinstance(value, Tensor | int | float):
            raise Failed(f"metric {name!r} is a {type(value).__name__}", "a metric is one number")


def _information(under_test: LossUnderTest, case: Case) -> str | None:
    """Compare the expected gradients on an enumerable softmax policy under some references, or sets of advantages."""
    if under_test.paired:
        raise NotApplicable("the expectation over one answer says nothing of a pair")
    told = []
    for field, words in (("ref_logprobs", "reference"), ("advantages", "advantages")):
        if field not in under_test.fields or (field == "advantages" and under_test.relative):  # one reward says nothing
            continue
        # A baseline over the group leaves nothing of a sequence that is alone.
        beside = field == "advantages" and not bool(
            (_expected(under_test, field, _REFERENCES[0]).nan_to_num() != 0).any()
        )
        first, *others = (_expected(under_test, field, values, beside=beside) for values in _REFERENCES)
        if any(float((first - other).abs().max()) > 1e-9 for other in others):
            told.append(field)
        elif field == "advantages" or _value_depends(under_test, field):
            raise Failed(
                f"on a softmax policy of four tokens the expected gradient is the same for any {words}: the loss carries no "
                f"information about the {words}",
                _why_silent(under_test)
                if field == "ref_logprobs"
                else "the advantages are not multiplied with a ratio or a log-prob",
                kind_case(True),
            )
    if not told:
        raise NotApplicable("it reads neither a reference nor advantages, or makes no use of them by default")
    return None


def _why_silent(under_test: LossUnderTest) -> str:
    """Return why a reference that the value depends on is not in the gradient."""
    remedy = "use k3, or the reverse KL's gradient (logprob - ref, detached, times logprob)"
    k1 = f"a KL estimated by k1, whose gradient is a constant of expectation 0: {remedy}"
    if "advantages" not in under_test.fields:
        return f"a KL that is detached, or {k1}"
    alone = under_test.measure(kind_case(False).edited("advantages", lambda i, j, a: 0.0)).flat
    return (
        k1 if bool((alone != 0).any()) else "the KL is detached, or computed under no_grad: it has no gradient at all"
    )


def _value_depends(under_test: LossUnderTest, field: str) -> bool:
    case = kind_case(False)
    other = case.edited(field, lambda i, j, x: x + 0.0371 * (1 + i + 2 * j))
    return not torch.equal(under_test.value(case), under_test.value(other))


def _expected(under_test: LossUnderTest, field: str, probabilities: tuple[float, ...], beside: bool = False) -> Tensor:
    """Return ``sum_a p(a) dL/dlogprob(a) (e_a - p)``: the expected gradient in the logits of the policy.

    Args:
        under_test: the loss.
        field: the reference, or the advantages, of each answer.
        probabilities: what they are made of.
        beside: another answer of the same group, the same each time, is in the batch.
    """
    p = torch.tensor(_PROBABILITIES, dtype=torch.float64)
    total = torch.zeros_like(p)
    for a, probability in enumerate(_PROBABILITIES):
        at, ref = math.log(probability), math.log(0.25)
        row = CaseSequence([at], [1.0], [1.0], [at], [at], [ref])
        number = math.log(probabilities[a]) if field == "ref_logprobs" else 10 * probabilities[a]
        first = Case((row,), with_old=True).edited(field, _always(number))
        case = replace(first, sequences=(*first.sequences, row)) if beside else first
        slope = float(under_test.measure(case).flat[0])
        unit = torch.zeros_like(p)
        unit[a] = 1.0
        total = total + probability * slope * (unit - p)
    return total


def _always(number: float) -> Callable[[int, int, float], float]:
    return lambda i, j, x: number


CONDUCT = (
    Property(
        "deterministic",
        "The same numbers give the same bits.",
        ("random numbers inside the loss", "a state between the calls"),
        _deterministic,
    ),
    Property(
        "stateless",
        "A call leaves nothing behind for the next one.",
        ("a running mean, or a counter, between the calls",),
        _stateless,
    ),
    Property(
        "pure",
        "The inputs are left as they were.",
        ("an operation in place on an input (add_, masked_fill_, [...] = )",),
        _pure,
    ),
    Property("metrics", "Metrics are numbers without a gradient.", ("a metric is not detached",), _metrics),
    Property(
        "information",
        "The expected gradient depends on the reference and on the advantages.",
        ("a KL without a gradient",),
        _information,
        "none",
    ),
)
