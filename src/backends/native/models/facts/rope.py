"""Rotary embeddings whose frequencies depend on the longest text of a forward: kept from mixing texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..packed_attention import segments_of

__all__ = ["forward_by_length", "reset_dynamic_rope"]

Forward = Callable[[Tensor, Tensor], Tensor]


def reset_dynamic_rope(module: nn.Module) -> None:
    """Let rotary embeddings with dynamic scaling forget the longest text so far: a forward depends on its input alone."""
    rotary: list[Any] = [one for one in module.modules() if hasattr(one, "original_max_seq_len")]
    for one in rotary:
        for name in [n for n in vars(one) if n.endswith("max_seq_len_cached")]:
            if int(getattr(one, name)) > one.original_max_seq_len:
                _restore(one, name.removesuffix("max_seq_len_cached"), name)


def _restore(rotary: Any, prefix: str, name: str) -> None:
    original = getattr(rotary, f"{prefix}original_inv_freq")
    rotary.register_buffer(f"{prefix}inv_freq", original.to(getattr(rotary, f"{prefix}inv_freq").device), False)
    setattr(rotary, name, rotary.original_max_seq_len)


def forward_by_length(tokens: Tensor, positions: Tensor, threshold: int, forward: Forward) -> Tensor:
    """Run the short and the long sequences of a packed row apart, so that neither decides about the other.

    Args:
        tokens: int64 [1, L].
        positions: int64 [1, L], restarting where a sequence begins or forks.
        threshold: longest sequence that counts as short, tokens.
        forward: returns the hidden states of such a row, [1, L, H].

    Returns:
        Hidden states, [1, L, H].
    """
    long = _is_long(positions[0], threshold)
    if bool(long.all()) or not bool(long.any()):
        return forward(tokens, positions)
    places = [(~long).nonzero()[:, 0], long.nonzero()[:, 0]]
    hidden = torch.cat([forward(tokens[:, place], positions[:, place]) for place in places], 1)
    return hidden[:, torch.cat(places).argsort()]


def _is_long(positions: Tensor, threshold: int) -> Tensor:
    """Return which tokens belong to a sequence, its forks included, that has one longer than the threshold, bool [L]."""
    segments = segments_of(positions)
    ends = {one.base: 0 for one in segments}
    for one in segments:
        ends[one.base] = max(ends[one.base], one.shared + one.end - one.start)
    found = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
    for one in segments:
        found[one.start : one.end] = ends[one.base] > threshold
    return found
