"""What makes the host wait for a device: forbidden, or counted, on a machine that has none."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pullback.losses

__all__ = ["CountedReads", "ForbiddenReads", "pretend_device"]

_SIZES_FROM_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
_READS = {"_local_scalar_dense", "is_nonzero", "equal", "item", *_SIZES_FROM_VALUES}
_METHODS = {"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "is_nonzero"}


def pretend_device(patch: pytest.MonkeyPatch) -> None:
    """Make the losses treat tensors of the CPU as they treat those of a device, whose values cannot be looked at."""
    for found in pkgutil.walk_packages(pullback.losses.__path__, "pullback.losses."):
        module = importlib.import_module(found.name)
        if hasattr(module, "readable"):
            patch.setattr(module, "readable", lambda tensor: False)


class ForbiddenReads(TorchDispatchMode):
    """Raises at an operation that reads a value from the device, or whose size depends on one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _READS or indexed or unsized:
            raise AssertionError(f"{func} reads a value")
        return func(*args, **kwargs)


class CountedReads(TorchFunctionMode):
    """Counts the ways in which Python reads a value: ``tolist`` and its kind.

    Attributes:
        count: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _METHODS and any(isinstance(a, Tensor) for a in args):
            self.count += 1
        return func(*args, **(kwargs or {}))
