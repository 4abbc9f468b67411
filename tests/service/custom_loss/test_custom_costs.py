"""Every operation that a custom loss may be made of takes no more than was counted, whatever its arguments are."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from clients.graphs import Meter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import SOAK, TIER
from torch import Tensor

from pullback.errors import ConfigError
from pullback.service.custom_loss.allowlist import FUNCTIONS, METHODS
from pullback.service.custom_loss.arguments import check_arguments, is_value
from pullback.service.custom_loss.costs import cost_of

EXAMPLES = 100_000 if SOAK else 400 if TIER == "all" else 60

dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool])
sizes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 7]), max_size=3)
whole = st.sampled_from([-2, -1, 0, 1, 2, 3, 40])


@st.composite
def tensors(draw: st.DrawFn, shape: Any = sizes, kinds: Any = dtypes) -> Tensor:
    """Draw a tensor; one of numbers with a fraction is differentiable."""
    dtype, of = draw(kinds), draw(shape)
    if dtype.is_floating_point:
        return torch.rand(of, dtype=dtype).requires_grad_()
    return torch.ones(of, dtype=dtype) if dtype == torch.bool else torch.zeros(of, dtype=dtype)


items = (
    st.sampled_from([0, -1, None, ..., True, slice(None), slice(1, None), slice(None, None, 2), [0, 0, 0], [0]])
    | tensors(kinds=st.just(torch.int64))
    | tensors(kinds=st.just(torch.bool))
)
plain = tensors() | whole | st.floats(0, 1) | st.sampled_from([None, True]) | st.lists(whole, max_size=3)


@st.composite
def arguments(draw: st.DrawFn, name: str) -> list[Any]:
    """Draw arguments that the operation may be able to take."""
    first = draw(tensors())
    if name == "getitem":
        return [first, draw(items | st.lists(items, max_size=3).map(tuple))]
    if name in ("cat", "concat", "stack"):
        return [[first] * draw(st.integers(1, 9)), draw(whole)] if draw(st.booleans()) else [[first] * 3]
    if name in ("gather", "index_select", "take_along_dim"):
        index = draw(tensors(kinds=st.just(torch.int64)))
        return [first, index, draw(whole)] if name == "take_along_dim" else [first, draw(whole), index]
    if draw(st.booleans()):
        return [first, draw(tensors(shape=st.just(list(first.shape))))]
    if draw(st.integers(0, 3)) == 0:
        matrix = draw(tensors(shape=st.just([*first.shape[:-2], *reversed(first.shape[-2:])])))
        return [first, matrix]
    return [first, *draw(st.lists(plain, max_size=3))]


OPERATIONS = sorted(
    [(name, function) for name, function in FUNCTIONS.items() if not name.startswith("math.")]
    + [(name, getattr(Tensor, name)) for name in METHODS if hasattr(Tensor, name)],
    key=lambda pair: pair[0],
)


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_no_result_is_larger_than_was_counted(data: st.DataObject) -> None:
    """Every operation with any arguments: its results and, but for a factor, all that torch makes inside and backward."""
    target, function = data.draw(st.sampled_from(OPERATIONS))
    name = target.rpartition(".")[2]
    args = data.draw(arguments(name))
    try:
        check_arguments(target, args, {})
    except ConfigError:
        return
    cost, meter = cost_of(name, args, {}), Meter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with meter:
                result = function(*args)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            NotImplementedError,
            AttributeError,
            ZeroDivisionError,
        ):
            return
    if not is_value(result):
        return
    made = [r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, Tensor)]
    assert sum(tensor.numel() for tensor in made) <= cost.numbers, (target, args)
    assert all(tensor.element_size() <= 8 for tensor in made)
    given_bytes = 8 * sum(arg.numel() for arg in args if isinstance(arg, Tensor))
    assert meter.bytes <= 3 * 8 * cost.numbers + 256, (target, args)
    whole_meter = Meter()
    with whole_meter:
        slopes = [tensor.sum() for tensor in made if tensor.requires_grad]
        if slopes:
            with contextlib.suppress(RuntimeError):  # dtypes that only the forward pass of a function takes
                torch.stack([slope.double() for slope in slopes]).sum().backward()
    assert whole_meter.bytes <= 8 * (8 * cost.numbers + given_bytes) + 1024 * (1 + len(made)), (target, args)


def test_an_operation_that_is_not_counted_is_noticed() -> None:
    """Negative control of the property: its meter sees what an operation outside the list makes."""
    meter = Meter()
    with meter:
        torch.ones(3).repeat(1000)
    assert meter.bytes >= 12_000
    assert cost_of("exp", [torch.ones(3)], {}).numbers == 3
