"""The arguments of a graph's operations: numbers, tensors and slices, and lists of them where an operation takes lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["check_arguments", "count_values", "decode_argument", "is_value"]

_MAX_LIST: Final = 64
_MAX_DEPTH: Final = 8
_LARGEST: Final = 2.0**53
_REAL: Final = "bool uint8 int8 int16 int32 int64 int short long half float double float16 bfloat16 float32 float64"
_DTYPES: Final = frozenset(_REAL.split())
# Arguments that are words; every word that they may be.
_WORDS: Final = {
    "reduction": ("none", "mean", "sum"),
    "rounding_mode": ("floor", "trunc"),
    "approximate": ("none", "tanh"),
    "p": ("fro",),
}
_LISTS: Final = frozenset(("cat", "concat", "stack"))  # of tensors


def decode_argument(arg: Any, values: Mapping[str, Any], depth: int = 0) -> Any:
    """Return an argument as the protocol writes it, with what its references stand for.

    Raises:
        ConfigError: it is malformed, too deep, too long, or refers to what no earlier node has made.
    """
    if depth > _MAX_DEPTH:
        raise ConfigError("an argument of the graph is nested too deeply")
    if isinstance(arg, list):
        if len(arg) > _MAX_LIST:
            raise ConfigError(
                f"an argument of the graph is a list of {len(arg)}; this server takes at most {_MAX_LIST}"
            )
        return [decode_argument(a, values, depth + 1) for a in arg]
    if not isinstance(arg, dict):
        return arg
    if len(arg) != 1:
        raise ConfigError("an encoded argument must have one key")
    ((kind, value),) = arg.items()
    return _decode_object(kind, value, values, depth + 1)


def _decode_object(kind: str, value: Any, values: Mapping[str, Any], depth: int) -> Any:
    if kind == "ref":
        if value not in values:
            raise ConfigError(f"the graph refers to {value!r}, which no earlier node has made")
        return values[value]
    if kind == "tuple":
        return tuple(decode_argument(value, values, depth))
    if kind == "dict":
        if len(value) > _MAX_LIST:
            raise ConfigError(f"the graph has a dictionary of {len(value)}; this server takes at most {_MAX_LIST}")
        return {str(key): decode_argument(item, values, depth) for key, item in value.items()}
    if kind == "slice":
        return slice(*decode_argument(value, values, depth))
    return _decode_constant(kind, value)


def _decode_constant(kind: str, value: Any) -> Any:
    if kind == "ellipsis":
        return ...
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "dtype" and value in _DTYPES:
        return getattr(torch, value)
    if kind == "device" and value == "cpu":
        return torch.device("cpu")
    raise ConfigError(f"the graph has an argument of kind {kind!r} ({value!r}), which this server does not read")


def count_values(encoded: Any) -> int:
    """Return how many values an encoded argument is made of."""
    if isinstance(encoded, (list, dict)):
        return 1 + sum(map(count_values, encoded.values() if isinstance(encoded, dict) else encoded))
    return 1


def is_value(result: Any) -> bool:
    """Whether an operation's result may be an argument of another: a number, a tensor, several tensors, a shape or a dtype."""
    if isinstance(result, (tuple, list)):
        return all(isinstance(item, Tensor) for item in result) or all(type(item) is int for item in result)
    return isinstance(result, (Tensor, bool, int, float, torch.dtype))


def check_arguments(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that an operation gets nothing but numbers, tensors and slices, and words only where it takes words by name.

    Raises:
        ConfigError: something else; it names what.
    """
    module, _, name = target.rpartition(".")
    scalar = module in ("operator", "math")
    for i, arg in enumerate(args):
        if name == "getitem":
            _check_item(target, i, arg)
        elif name in _LISTS and i == 0 and isinstance(arg, (list, tuple)):
            _check_all_tensors(target, arg)
        else:
            _check_plain(target, arg, lists=not scalar)
    for key, arg in kwargs.items():
        if isinstance(arg, str) and arg in _WORDS.get(key, ()):
            continue
        if (key == "out" and arg is not None) or (key == "inplace" and arg):
            raise ConfigError(f"{target} with {key}: a custom loss makes new tensors, and changes none")
        if name in _LISTS and key == "tensors" and isinstance(arg, (list, tuple)):
            _check_all_tensors(target, arg)
        else:
            _check_plain(target, arg, lists=not scalar)
    if scalar:
        _check_scalars(target, args)


def _check_plain(target: str, arg: Any, *, lists: bool) -> None:
    if isinstance(arg, (list, tuple)) and lists:
        if len(arg) > _MAX_LIST or not all(type(item) in (int, bool) for item in arg):
            raise ConfigError(f"{target} takes lists of at most {_MAX_LIST} whole numbers, got {_shown(arg)}")
    elif arg is not None and not isinstance(arg, (Tensor, bool, int, float, torch.dtype, torch.device)):
        raise ConfigError(f"{target} takes numbers, tensors and slices, got {_shown(arg)}")


def _check_all_tensors(target: str, arg: Sequence[Any]) -> None:
    if not all(isinstance(item, Tensor) for item in arg):
        raise ConfigError(f"{target} takes a list of tensors, got {_shown(arg)}")


def _check_item(target: str, place: int, arg: Any) -> None:
    """Check what is indexed (a tensor, a shape, several tensors), or an index."""
    if place == 0:
        if not isinstance(arg, (Tensor, tuple, list)):
            raise ConfigError(f"{target} takes a part of a tensor, a shape or several tensors, got {_shown(arg)}")
        return
    for item in arg if isinstance(arg, tuple) else (arg,):
        if isinstance(item, slice):
            bounds = (item.start, item.stop, item.step)
            fits = all(b is None or type(b) is int or (isinstance(b, Tensor) and b.dim() == 0) for b in bounds)
        elif isinstance(item, list):
            fits = all(type(entry) in (int, bool) for entry in item)
        else:
            fits = item is None or item is ... or isinstance(item, (Tensor, bool, int))
        if not fits:
            raise ConfigError(f"{target} takes whole numbers, slices and tensors as indices, got {_shown(item)}")


def _check_scalars(target: str, args: Sequence[Any]) -> None:
    """Bound the arithmetic of plain numbers, which Python would carry on to any length."""
    if any(isinstance(arg, (Tensor, tuple, list)) for arg in args):
        return
    numbers = [arg for arg in args if isinstance(arg, (int, float))]
    if any(abs(number) > _LARGEST for number in numbers if math.isfinite(number)):
        raise ConfigError(f"{target} on plain numbers over 2**53")
    if target in ("operator.pow", "math.pow") and any(abs(number) > 64 for number in numbers[1:]):
        raise ConfigError(f"{target} on plain numbers with an exponent over 64")


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, (str, list, tuple, dict)) else f"a {kind}"
