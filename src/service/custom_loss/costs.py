"""What every allowed operation costs at most, from the shapes of its arguments alone: asked before it runs.

A dimension of no elements counts as one: the sum over it has the size of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .budget import NUMBER_BYTES, PER_NODE, Cost

__all__ = ["broadcast_numbers", "cost_of"]

_PLAIN: Final = 5  # nanoseconds for each number that is read or written, forward and backward, as measured on one core
_FUNCTION: Final = 25
_SCAN: Final = 300
_PIECE_BYTES: Final = 1024  # of one tensor of a sequence of tensors
_SIMPLE: Final = """
abs add and_ bitwise_and bitwise_not bitwise_or bool ceil clamp clamp_max clamp_min clip clone concat contiguous detach div
divide double eq equal flatten flip float floor full_like ge greater gt int invert isfinite isinf isnan le less logical_and
logical_not logical_or logical_xor long lt masked_fill mul multiply narrow ne neg negative ones_like or_ permute pos relu
reshape round sign square squeeze sub subtract sum t to transpose true_divide truediv trunc type_as unsqueeze view where
zeros_like mean T
"""
_CHEAP: Final = frozenset(_SIMPLE.split())
_METADATA: Final = ("dim", "size", "numel", "nelement", "shape", "ndim", "dtype")
Arguments = Sequence[Any]
Named = Mapping[str, Any]


def cost_of(name: str, args: Arguments, kwargs: Named) -> Cost:
    """Return the most that an operation can cost.

    Args:
        name: of the function or method, without its module.
        args, kwargs: that it will be given, `self` of a method first.
    """
    if name == "getitem" and args and not isinstance(args[0], Tensor):
        return Cost(0, _FUNCTION * len(args[0]))
    tensors = list(_tensors([*args, *kwargs.values()]))
    if name in _METADATA or not tensors:
        return Cost()
    rule = _RULES.get(name, _elementwise)
    cost = rule(args, kwargs, tensors)
    each = _PLAIN if name in _CHEAP else _FUNCTION
    moved = cost.numbers + sum(tensor.numel() for tensor in tensors)
    return Cost(cost.numbers, cost.operations + each * moved)


def broadcast_numbers(shapes: Iterable[Sequence[int]]) -> int:
    """Return how many numbers shapes have together, at most, when they are broadcast."""
    sizes: list[int] = []
    for shape in shapes:
        for k, size in enumerate(reversed(shape)):
            if k == len(sizes):
                sizes.append(1)
            sizes[k] = max(sizes[k], size)
    return math.prod(sizes)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _numbers(tensor: Tensor) -> int:
    return math.prod(max(1, size) for size in tensor.shape)


def _argument(args: Arguments, kwargs: Named, place: int, name: str, default: int) -> int:
    value = args[place] if len(args) > place else kwargs.get(name, default)
    return value if isinstance(value, int) else default


def _elementwise(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """Results of the broadcast size of all tensors; reductions and views have no more."""
    return Cost(broadcast_numbers(tensor.shape for tensor in tensors))


def _twice(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """Values and their indices."""
    return Cost(2 * broadcast_numbers(tensor.shape for tensor in tensors))


def _composed(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """Functions that torch puts together from several others, whose results are kept too."""
    return Cost(5 * broadcast_numbers(tensor.shape for tensor in tensors))


def _joined(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    return Cost(sum(map(_numbers, tensors)), PER_NODE // 4 * len(tensors))


def _sorted(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    numbers = sum(map(_numbers, tensors))
    return Cost(2 * numbers, 10 * numbers * max(1, numbers.bit_length()))


def _scanned(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    numbers = sum(map(_numbers, tensors))
    return Cost(numbers, _SCAN * numbers)


def _differences(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """Each of the n differences is a step of its own."""
    n, numbers = max(1, _argument(args, kwargs, 1, "n", 1)), sum(map(_numbers, tensors))
    return Cost((n + 1) * numbers, n * (PER_NODE + _PLAIN * numbers))


def _rolled(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """Each dimension is a copy of its own."""
    shifts = args[1] if len(args) > 1 else kwargs.get("shifts", 0)
    copies = len(shifts) if isinstance(shifts, (list, tuple)) else 1
    return Cost(copies * _numbers(tensors[0]), copies * (PER_NODE + _PLAIN * _numbers(tensors[0])))


def _where(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """With a condition alone: the indices of what is true in it, one tensor a dimension."""
    whole = broadcast_numbers(tensor.shape for tensor in tensors)
    return Cost(whole if len(args) + len(kwargs) > 1 else 2 * whole * max(1, tensors[0].dim()))


def _pieces(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """A tensor for each index of a dimension; the backward of each is as large as its piece."""
    tensor, dim = tensors[0], _argument(args, kwargs, 1, "dim", 0)
    count = tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else 1
    return Cost(_numbers(tensor) + count * _PIECE_BYTES // NUMBER_BYTES, count * PER_NODE)


def _matmul(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """Batches are copied for every matrix that they are multiplied with."""
    if len(tensors) != 2 or not all(tensor.dim() for tensor in tensors):
        return _elementwise(args, kwargs, tensors)
    left, right = tensors
    rows, inner = (1, *left.shape)[-2:]
    columns = right.shape[-1] if right.dim() > 1 else 1
    batch = broadcast_numbers((left.shape[:-2], right.shape[:-2]))
    products = batch * math.prod(max(1, size) for size in (rows, inner, columns))
    numbers = batch * sum(max(1, a) * max(1, b) for a, b in ((rows, inner), (inner, columns), (rows, columns)))
    exact = not (left.is_floating_point() and right.is_floating_point())  # without a fast library
    return Cost(numbers, (12 if exact else 3) * products)


def _index_select(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    if len(tensors) != 2:
        return _elementwise(args, kwargs, tensors)
    tensor, index = tensors
    dim = _argument(args, kwargs, 1, "dim", 0)
    length = max(1, tensor.shape[dim]) if -tensor.dim() <= dim < tensor.dim() else 1
    return Cost(_numbers(tensor) // length * _numbers(index))


def _indexed(args: Arguments, kwargs: Named, tensors: list[Tensor]) -> Cost:
    """The product of what the indices broadcast to and of all dimensions that no index takes."""
    tensor, index = args[0], args[1] if len(args) > 1 else ()
    items = index if isinstance(index, tuple) else (index,)
    unnamed = tensor.dim() - sum(_taken(item) for item in items)
    advanced, sizes, free = [], iter([max(1, size) for size in tensor.shape]), 1
    for item in items:
        count = max(0, unnamed) if item is ... else _taken(item)
        span = math.prod(next(sizes, 1) for _ in range(count))
        if isinstance(item, Tensor):
            mask = item.dtype in (torch.bool, torch.uint8)
            advanced.append((max(1, item.numel()),) if mask else item.shape)
        elif isinstance(item, list):
            advanced.append((len(item),))
        elif not isinstance(item, int):
            free *= span
    return Cost(broadcast_numbers(advanced) * free * math.prod(sizes))


def _taken(item: Any) -> int:
    """Dimensions that an index takes."""
    if item is None or item is ... or isinstance(item, bool):
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


_RULES: Final[dict[str, Callable[[Arguments, Named, list[Tensor]], Cost]]] = {
    **dict.fromkeys(("cat", "concat", "stack"), _joined),
    **dict.fromkeys(("argsort", "sort", "topk"), _sorted),
    **dict.fromkeys(("max", "min", "median", "cumprod"), _twice),
    **dict.fromkeys(("hinge_embedding_loss", "softsign"), _composed),
    "diff": _differences,
    "getitem": _indexed,
    "index_select": _index_select,
    "logcumsumexp": _scanned,
    "matmul": _matmul,
    "roll": _rolled,
    "unbind": _pieces,
    "where": _where,
}
