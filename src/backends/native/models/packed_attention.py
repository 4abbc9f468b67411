"""Attention over sequences packed end to end: each by itself, without a mask (transformers models)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ....errors import UnsupportedError

__all__ = ["NAME", "PackedRow", "Segment", "install", "packed_inputs"]

NAME = "pullback_segments"
_current: ContextVar[PackedRow | None] = ContextVar("row of packed sequences", default=None)


def install(causal: Any) -> bool:
    """Let a transformers model attend segment by segment where its inputs say so; return whether it can.

    A block-diagonal mask would cost attention over the square of all tokens; this costs the sum of the squares. Only
    models on PyTorch's attention are switched; flash kernels pack by themselves.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if causal.config._attn_implementation not in ("sdpa", NAME):
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, _by_segment(sdpa_attention_forward))
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _of_current_row(sdpa_mask))
    causal.set_attn_implementation(NAME)
    return bool(causal.config._attn_implementation == NAME)


def _by_segment(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Return an attention function that goes through the segments that its inputs name, one after another."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        segments: Sequence[Segment] | None = kwargs.pop("segments", None)
        length = query.shape[2]
        if segments is None or (attention_mask is not None and attention_mask.shape[-2:] != (length, length)):
            return attention(module, query, key, value, attention_mask, **kwargs)
        found = []
        for one in segments:
            kwargs["is_causal"] = one.shared == 0
            keys, values = one.seen(key), one.seen(value)
            visible = one.visible(query.device, attention_mask)
            queries = query[:, :, one.start : one.end]
            found.append(attention(module, queries, keys, values, visible, **kwargs)[0])
        return torch.cat(found, 1), None

    return attend


def _of_current_row(usual: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes the mask of the row of packed sequences that the model runs on, if it runs on one."""

    def mask(*call: Any, **kwargs: Any) -> Any:
        row = _current.get()
        if row is None:
            return usual(*call, **kwargs)
        if kwargs.get("use_vmap", False):  # the model adds a pattern of its own to the causal mask
            row.require_no_forks()
            return usual(*call, **kwargs)
        return row.mask(kwargs.get("local_size"), kwargs.get("config"), kwargs.get("device", "cpu"))

    return mask


@final
@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``end`` of a row; before them the sequence has ``shared`` tokens that lie at ``base``."""

    start: int
    end: int
    base: int
    shared: int

    def seen(self, x: Tensor, dim: int = 2) -> Tensor:
        """Return the keys or values [1, heads, L, D] that its tokens may see, along the dimension of L."""
        own = x.narrow(dim, self.start, self.end - self.start)
        return torch.cat([x.narrow(dim, self.base, self.shared), own], dim) if self.shared else own

    def visible(self, device: torch.device, mask: Tensor | None = None) -> Tensor | None:
        """Return which key each of its tokens sees, bool [1, 1, own, keys]; None: all up to itself, nothing shared.

        Args:
            device: of the result.
            mask: of the whole row, [1, 1, L, L], where the layer has one.
        """
        if mask is not None:
            return self.seen(mask.narrow(2, self.start, self.end - self.start), 3)
        if not self.shared:
            return None
        own = self.end - self.start
        return torch.ones(1, 1, own, self.shared + own, dtype=torch.bool, device=device).tril(self.shared)


@final
@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row of packed sequences, while a model runs on it.

    Attributes:
        positions: int64 [L].
        segments: the row, cut where its positions do not run on.
    """

    positions: Tensor
    segments: Sequence[Segment]

    def require_no_forks(self) -> None:
        """Refuse a shared prefix.

        Raises:
            UnsupportedError: the row has one.
        """
        if any(one.shared for one in self.segments):
            raise UnsupportedError("this model's own attention pattern is not known for sequences that share a prefix")

    def mask(self, local: int | None, config: Any, device: torch.device | str) -> Tensor | None:
        """Return which key each token sees in a layer, bool [1, 1, L, L], by position and not by place in the row.

        Args:
            local: attention window or chunk of the layer, tokens; None: the layer sees everything before it.
            config: of the model; says whether ``local`` is a window or a chunk.
            device: of the result.

        Returns:
            None where segments alone say it.
        """
        if local is not None and int(self.positions.max()) < local:
            local = None
        if local is None:
            return None
        positions = self.positions.to(device)
        query, key = positions[:, None], positions[None, :]
        seen = self._related(positions) & (key <= query)
        if _is_chunk(config, local):
            seen &= key // local == query // local
        else:
            seen &= key > query - local
        return seen[None, None]

    def _related(self, positions: Tensor) -> Tensor:
        """Return whether a token's sequence holds another token, bool [L, L]."""
        related = torch.zeros(len(positions), len(positions), dtype=torch.bool, device=positions.device)
        for one in self.segments:
            related[one.start : one.end, one.start : one.end] = True
            related[one.start : one.end, one.base : one.base + one.shared] = True
        return related


def _is_chunk(config: Any, local: int) -> bool:
    chunk, window = getattr(config, "attention_chunk_size", None), getattr(config, "sliding_window", None)
    if chunk == local == window:
        raise UnsupportedError(f"window and chunk of this model are both {local} tokens; they cannot be told apart")
    return bool(chunk == local)


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

    Args:
        positions: int64 [1, L].
    """
    row = PackedRow(positions[0], segments_of(positions[0]))
    token = _current.set(row)
    try:
        yield {"segments": row.segments}
    finally:
        _current.reset(token)
