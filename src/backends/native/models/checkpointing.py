"""Recomputing a layer's activations in the backward, with the layer in evaluation mode as everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ....errors import UnsupportedError

__all__ = ["checkpoint_layers"]


def checkpoint_layers(model: nn.Module) -> int:
    """Let every layer of a transformers model run again in the backward; return how many.

    transformers does so only in training mode, in which a layer also drops out what it drops by itself.

    Raises:
        UnsupportedError: the model has no such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(below) for layer in layers for below in layer.modules() if below is not layer}
    outer = [layer for layer in layers if id(layer) not in inner]
    if not outer:
        raise UnsupportedError(
            f"{type(model).__name__} has no layers that can be recomputed; use gradient_checkpointing=False"
        )
    for layer in outer:
        # Bound methods and partials are copied with what they hold, so that a deep copy of the model runs its own layers.
        layer.forward = partial(_again, layer.forward)
    return len(outer)


def _again(forward: Any, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(partial(forward, **named), *inputs, use_reentrant=False)
