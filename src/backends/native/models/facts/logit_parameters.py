"""What is trained of a model's logits must be in its hidden states or its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .....errors import UnsupportedError

__all__ = ["require_no_others"]


def require_no_others(causal: Any, base: nn.Module, head: nn.Module) -> None:
    """Check that no trained parameter changes the logits but those of the base model, and weight and bias of the head.

    Such a one, a scale for each token for example, may change nothing at its start, and would get no gradient.

    Args:
        causal: of transformers.
        base: what gives its hidden states.
        head: its output projection.

    Raises:
        UnsupportedError: there is one.
    """
    wrapped = type(head).__module__.startswith("peft.")  # what adapters do to the logits is checked elsewhere
    of_head = list(head.parameters()) if wrapped else [head.weight, getattr(head, "bias", None)]
    known = {id(p) for p in (*base.parameters(), *of_head)}
    others = {n: p for n, p in causal.named_parameters() if p.requires_grad and id(p) not in known}
    if not others:
        return
    with torch.enable_grad():
        tokens = torch.arange(4, device=base.get_input_embeddings().weight.device)[None]  # type: ignore[operator]
        logits = causal(input_ids=tokens, use_cache=False).logits
        slopes = torch.autograd.grad(logits.sum(), list(others.values()), allow_unused=True)
    named = [name for name, slope in zip(others, slopes, strict=True) if slope is not None]
    if named:
        raise UnsupportedError(
            f"{type(causal).__name__} computes its logits with {', '.join(named)} beside hidden states and a head; freeze "
            "them, or write an adapter with hidden_states and head"
        )
