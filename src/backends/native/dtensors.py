"""Tensors that may be sharded over processes (PyTorch's DTensor), as a whole and in part."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import BackendError

__all__ = ["full", "local_part", "require_whole"]


def require_whole(module: nn.Module) -> None:
    """Check that no parameter of a model is sharded.

    Raises:
        BackendError: one is.
    """
    if any(hasattr(p, "full_tensor") for p in module.parameters()):
        raise BackendError(
            "the model is sharded already; give TorchBackend the whole model, with its adapters, and it shards "
            "both: an adapter that is added to a sharded model is not reduced over ranks: its gradient is silently wrong"
        )


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
