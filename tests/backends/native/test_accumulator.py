"""Gradients of calls are added as wholes: each divided once, none half, and none that is not finite unnoticed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reads import CountedReads
from torch import Tensor, nn

from pullback.backends.native.accumulator import Accumulator, all_finite
from pullback.errors import NonFiniteError

CALLS = st.lists(st.tuples(st.integers(-4, 4), st.sampled_from([1.0, 2.0, 0.5, 4.0])), min_size=1, max_size=4)


def made() -> Accumulator:
    """Three parameters, of which the last one is never used."""
    return Accumulator({name: nn.Parameter(torch.ones(2, dtype=torch.float64)) for name in ("a", "b", "unused")})


def write(accumulator: Accumulator, size: float, *names: str) -> None:
    for name in names:
        (size * accumulator.parameters[name].sum()).backward()


@given(calls=CALLS, only_later=st.booleans())
def test_each_call_is_divided_and_added(calls: list[tuple[int, float]], only_later: bool) -> None:
    """By its own divisor, asked for when it is done; a parameter may be used by later calls alone, or by none."""
    accumulator, done = made(), list[float]()
    for i, (size, divisor) in enumerate(calls):

        def ask(divisor: float = divisor) -> float:
            done.append(divisor)
            return divisor

        with accumulator.adding(ask):
            assert len(done) == i
            assert accumulator.gradients == {}
            write(accumulator, size, "a", *([] if only_later and i == 0 else ["b"]))
    total = [sum(size / divisor for size, divisor in calls[start:]) for start in (0, int(only_later))]
    found = {name: gradient.tolist() for name, gradient in accumulator.gradients.items()}
    want = {"a": [total[0]] * 2, "b": [total[1]] * 2}
    if only_later and len(calls) == 1:
        del want["b"]
    assert found == want
    with accumulator.adding():
        write(accumulator, 1.0, "a")
    assert accumulator.gradients["a"].tolist() == [total[0] + 1.0] * 2
    assert accumulator.gradients.keys() == want.keys()


def test_a_call_that_fails_leaves_nothing() -> None:
    """What was there before is there again, also where there was nothing; what divides is not asked."""
    accumulator = made()
    with accumulator.adding():
        write(accumulator, 3.0, "a")

    def fail() -> None:
        with accumulator.adding(lambda: 1 / 0):
            write(accumulator, 5.0, "a", "b")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert {name: gradient.tolist() for name, gradient in accumulator.gradients.items()} == {"a": [3.0, 3.0]}


def test_a_division_by_zero_is_loud() -> None:
    """Gradients that are divided by 0 are not finite, so that none of them is stepped on."""
    accumulator = made()
    with accumulator.adding(lambda: 0.0):
        write(accumulator, 3.0, "a")
    with pytest.raises(NonFiniteError, match="the gradient of a"):
        accumulator.require_finite(lambda: "datum 0")


def test_finite_gradients_take_one_look() -> None:
    """However many there are: each look waits for the device."""
    accumulator = made()
    with accumulator.adding():
        write(accumulator, 3.0, "a", "b", "unused")
    with CountedReads() as reads:
        accumulator.require_finite(lambda: str(1 / 0))
    assert reads.count == 1


NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 6e4, -6e4, 3e38, -3e38, math.nan, math.inf, -math.inf])
FLOATS = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


class Elsewhere(Tensor):
    """A tensor that is not plain, as those that are spread over processes."""


@given(numbers=st.lists(st.tuples(FLOATS, st.lists(NUMBERS, max_size=4)), max_size=3), plain=st.booleans())
def test_finite_is_each_number(numbers: list[tuple[torch.dtype, list[float]]], plain: bool) -> None:
    """Also where finite numbers have a sum that is not, on both ways of looking."""
    tensors = [torch.tensor(row, dtype=torch.float64).to(dtype) for dtype, row in numbers]
    want = all(math.isfinite(x) for t in tensors for x in t.tolist())
    assert all_finite([t if plain else t.as_subclass(Elsewhere) for t in tensors]) == want


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["a", "b"])
def test_what_is_not_finite_is_named(wrong: float, name: str) -> None:
    """One entry is enough; finite gradients and none at all are fine, and nobody is blamed for them."""
    accumulator = made()
    accumulator.require_finite(lambda: str(1 / 0))
    gradients: dict[str, Tensor] = {key: torch.tensor([1.0, -1e300], dtype=torch.float64) for key in ("a", "b")}
    accumulator.restore(gradients)
    accumulator.require_finite(lambda: str(1 / 0))
    gradients[name] = torch.tensor([1.0, wrong], dtype=torch.float64)
    accumulator.restore(gradients)
    with pytest.raises(NonFiniteError, match=f"the gradient of {name} is not finite; first caused by datum 7"):
        accumulator.require_finite(lambda: "datum 7")
    accumulator.clear()
    assert accumulator.gradients == {}
    accumulator.restore({"b": torch.ones(2, dtype=torch.float64)})
    assert accumulator.gradients.keys() == {"b"}
