"""Attention over sequences packed end to end: each by itself, without a mask (transformers models)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAME", "install", "packed_inputs"]

NAME = "pullback_segments"
_longest: ContextVar[int | None] = ContextVar("longest packed sequence", default=None)


def install(causal: Any) -> bool:
    """Let a transformers model attend segment by segment where its inputs say so; return whether it can.

    A block-diagonal mask would cost attention over the square of all tokens, and memory for the mask; this costs the sum
    of the squares. Only models on PyTorch's attention are switched; flash kernels pack by themselves.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        lengths: Sequence[int] | None = kwargs.pop("segment_lengths", None)
        if lengths is None or attention_mask is not None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        kwargs["is_causal"] = True
        pieces = zip(*(torch.split(x, list(lengths), 2) for x in (query, key, value)), strict=True)
        return torch.cat([sdpa_attention_forward(module, *piece, None, **kwargs)[0] for piece in pieces], 1), None

    def mask(*call: Any, **kwargs: Any) -> Any:
        longest, local = _longest.get(), kwargs.get("local_size")
        own_pattern = kwargs.get("use_vmap", False)  # the model adds something to the causal mask
        if longest is not None and not own_pattern and (local is None or longest <= local):
            return None
        return sdpa_mask(*call, **kwargs)

    if causal.config._attn_implementation not in ("sdpa", NAME):
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    causal.set_attn_implementation(NAME)
    return bool(causal.config._attn_implementation == NAME)


@contextmanager
def packed_inputs(positions: Tensor) -> Iterator[dict[str, Any]]:
    """Yield what a model that was `install`-ed needs beside tokens and positions, for one row of packed sequences.

    The lengths travel as an input, not in the context, so that a checkpointed layer that runs again still has them.
    """
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    lengths = [b - a for a, b in zip(starts, [*starts[1:], positions.shape[1]], strict=True)]
    token = _longest.set(max(lengths))
    try:
        yield {"segment_lengths": lengths}
    finally:
        _longest.reset(token)
