"""Tensors that may be sharded over processes (PyTorch's DTensor), as a whole and in part."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["full", "local_part"]


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; where it is sharded, every process must ask."""
    sharded: Any = tensor
    whole: Tensor = sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def local_part(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies on this process."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if hasattr(tensor, "full_tensor") else tensor
    return part
