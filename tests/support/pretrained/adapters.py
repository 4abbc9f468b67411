"""Models around the tensors of one base, each with an adapter of its own that is no longer at its start."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from pullback.backends.native import HFModel
from pullback.backends.native.models.lora import add_lora

__all__ = ["adapted", "rank"]


def adapted(base: Any, lora: Any, seed: int = 0) -> HFModel:
    """Return a transformers model with an adapter, or without one (None); the base stays as it is.

    Args:
        base: a transformers model.
        lora: as of `add_lora`; or None.
        seed: of all that is trained, which is drawn anew.
    """
    tensors = [*base.parameters(), *base.buffers()]
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
    if lora is None:
        return HFModel(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = add_lora(model, lora)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.2)
    return HFModel(model)


def rank(r: int, *layers: str, **fields: Any) -> dict[str, Any]:
    """Return the fields of an adapter on these layers; none: on all linear ones."""
    return {"r": r, "lora_alpha": 3 * r, "target_modules": list(layers) or "all-linear", **fields}
