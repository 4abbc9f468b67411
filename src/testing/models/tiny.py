"""A small causal language model that computes in one dtype throughout."""

from __future__ import annotations

import math
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ...ops.head import Head

__all__ = ["TinyLM"]


class WeightFactory(Protocol):
    """Draws a random parameter of a given shape."""

    def __call__(self, *shape: int, scale: float = 1.0) -> nn.Parameter: ...


@final
class TinyLM(nn.Module):
    """A transformer that computes entirely in ``dtype``; the models of transformers normalise in fp32 whatever the dtype.

    Positions keep packed sequences apart: where they restart at 0 a new sequence begins, and where they fall back to
    another number a sequence continues from the shared prefix of that length.

    Args:
        vocab_size: V.
        hidden: H; divisible by ``heads``.
        layers: blocks.
        heads: attention heads.
        max_positions: longest sequence, tokens.
        seed: of the weights; the global random state does not change.
        dtype: fp64 for exact tests.
        tied: the head is the embedding.
    """

    def __init__(
        self,
        vocab_size: int = 17,
        hidden: int = 8,
        layers: int = 2,
        heads: int = 2,
        max_positions: int = 64,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        tied: bool = False,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter((drawn * scale / math.sqrt(shape[-1])).to(dtype))

        self.embedding = weight(vocab_size, hidden, scale=math.sqrt(hidden))
        self.positions = weight(max_positions, hidden, scale=math.sqrt(hidden) / 2)
        self.blocks = nn.ModuleList(_Block(weight, hidden, heads) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(hidden, dtype=dtype))
        self.unembedding = self.embedding if tied else weight(vocab_size, hidden, scale=2.0)

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states, [R, L, H]."""
        visible = causal_mask(positions)
        x = self.embedding[tokens] + self.positions[positions]
        for block in self.blocks:
            x = block(x, visible)
        return rms_norm(x, self.norm)

    def head(self) -> Head:
        """Return the output projection."""
        return Head(self.unembedding)


def causal_mask(positions: Tensor) -> Tensor:
    """Return which token attends to which, bool [R, L, L]: itself, earlier tokens of its sequence, and its shared prefix."""
    order = torch.arange(positions.shape[-1], device=positions.device)
    sequence = (positions == 0).cumsum(-1)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    segment = begins.cumsum(-1)
    prefix = positions - (order - torch.where(begins, order, 0).cummax(-1).values)  # length of the segment's prefix
    same_segment = segment[:, :, None] == segment[:, None, :]
    in_prefix = (prefix == 0)[:, None, :] & (positions[:, None, :] < prefix[:, :, None])
    same_sequence = sequence[:, :, None] == sequence[:, None, :]
    return same_sequence & (same_segment | in_prefix) & (order[:, None] >= order[None, :])


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Divide by the root mean square, in the dtype of ``x``."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


class _Block(nn.Module):
    def __init__(self, weight: WeightFactory, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = weight(3 * hidden, hidden)
        self.out = weight(hidden, hidden)
        self.up = weight(2 * hidden, hidden)
        self.down = weight(hidden, 2 * hidden)
        self.norm1 = nn.Parameter(torch.ones(hidden, dtype=self.qkv.dtype))
        self.norm2 = nn.Parameter(torch.ones(hidden, dtype=self.qkv.dtype))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self._attend(rms_norm(x, self.norm1), visible)
        return x + silu(rms_norm(x, self.norm2) @ self.up.T) @ self.down.T

    def _attend(self, x: Tensor, visible: Tensor) -> Tensor:
        rows, length, hidden = x.shape
        q, k, v = (x @ self.qkv.T).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        mixed: Tensor = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1) @ v
        return mixed.transpose(1, 2).reshape(rows, length, hidden) @ self.out.T
