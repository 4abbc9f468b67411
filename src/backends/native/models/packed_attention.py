"""Attention over sequences packed end to end: each by itself, without a mask (transformers models)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["NAME", "Segment", "install", "packed_inputs"]

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
        segments: Sequence[Segment] | None = kwargs.pop("segments", None)
        if segments is None or attention_mask is not None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        found = []
        for one in segments:
            kwargs["is_causal"] = one.shared == 0
            keys, values = one.seen(key), one.seen(value)
            visible = one.visible(query.device) if one.shared else None
            queries = query[:, :, one.start : one.end]
            found.append(sdpa_attention_forward(module, queries, keys, values, visible, **kwargs)[0])
        return torch.cat(found, 1), None

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


@final
@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``end`` of a row; before them the sequence has ``shared`` tokens that lie at ``base``."""

    start: int
    end: int
    base: int
    shared: int

    def seen(self, x: Tensor) -> Tensor:
        """Return the keys or values [1, heads, L, D] that its tokens may see."""
        own = x[:, :, self.start : self.end]
        return torch.cat([x[:, :, self.base : self.base + self.shared], own], 2) if self.shared else own

    def visible(self, device: torch.device) -> Tensor:
        """Return which key each of its tokens sees, bool [1, 1, own, keys]: all that is shared, and what lies before it."""
        own = self.end - self.start
        return torch.ones(1, 1, own, self.shared + own, dtype=torch.bool, device=device).tril(self.shared)


def segments_of(positions: Tensor) -> list[Segment]:
    """Cut a row where its positions do not run on: to a new sequence at 0, to a fork elsewhere."""
    cuts = [0, *((positions[1:] != positions[:-1] + 1).nonzero()[:, 0] + 1).tolist()]
    found, base = [], 0
    for start, end, shared in zip(cuts, [*cuts[1:], len(positions)], positions[cuts].tolist(), strict=True):
        base = start if shared == 0 else base
        found.append(Segment(start, end, base, shared))
    return found


@contextmanager
def packed_inputs(positions: Tensor) -> Iterator[dict[str, Any]]:
    """Yield what a model that was `install`-ed needs beside tokens and positions, for one row of packed sequences.

    The segments travel as an input, not in the context, so that a checkpointed layer that runs again still has them.
    """
    token = _longest.set(int(positions.max()) + 1)
    try:
        yield {"segments": segments_of(positions[0])}
    finally:
        _longest.reset(token)
