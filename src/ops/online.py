"""Scores and unit gradients by an online softmax over tiles of the vocabulary: each tile of W is read once."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from .fused import fused_rows, is_available
from .head import Head
from .rows import shape_logits_, sharpen_

__all__ = ["Online", "online_pass"]

_CACHE_BYTES = 2**20  # a block of rows that stays in a CPU core's cache from the maximum to the last write


class Online(NamedTuple):
    """What one pass found for C positions.

    Attributes:
        logprobs: fp32 (fp64) [C, K].
        entropy: [C], nats; None if it was not asked for.
        unit: ``d logprob / d hidden`` [C, H] for K = 1; None if it was not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    unit: Tensor | None


def online_pass(
    h: Tensor, head: Head, targets: Tensor, temperature: float, entropy: bool, unit: bool, width: int
) -> Online:
    """Score C positions; with ``unit`` also ``(onehot - p) @ W``, at one more product.

    Softmax and product of a tile are joined to those of the tiles before by their log-sum-exps (fp64). The target's own
    entry is left out of the products and enters once, as ``(1 - p_t) W[t]`` with ``1 - p_t`` summed from the others:
    ``W[t] - p @ W`` would cancel where the model is confident.

    Args:
        h: [C, H] in the dtype of the products, as ``head.weight``.
        head: detached.
        targets: int64 [C, K].
        temperature: divides the logits.
        entropy, unit: compute them.
        width: columns of V that go at once.
    """
    state = _State(h, targets, unit)
    vocab = len(head.weight)
    exact = h.is_cuda and h.dtype in (torch.bfloat16, torch.float16)  # a GPU gives their products in fp32, unrounded
    scratch = h.new_empty(0 if exact else len(h) * min(width, vocab))
    for first in range(0, vocab, width):
        tile = head._replace(
            weight=head.weight[first : first + width],
            bias=None if head.bias is None else head.bias[first : first + width],
        )
        if exact:
            z = torch.mm(h, tile.weight.T, out_dtype=torch.float32)
        else:
            z = torch.mm(h, tile.weight.T, out=scratch[: len(h) * len(tile.weight)].view(len(h), -1))
        state.add(z, tile, first, temperature, entropy)
    del z, scratch  # the rows of W that `result` takes would come on top
    return state.result(head, temperature, entropy)


@final
class _State:
    """Running sums of all tiles so far, relative to their log-sum-exp."""

    def __init__(self, h: Tensor, targets: Tensor, unit: bool) -> None:
        self._h, self._targets = h, targets
        self._exact = torch.float64 if h.dtype == torch.float64 else torch.float32
        rows = len(h)
        self._lse = h.new_full((rows,), -torch.inf, dtype=torch.float64)
        self._others = h.new_zeros(rows, dtype=torch.float64)
        self._mean_logit = h.new_zeros(rows, dtype=torch.float64)
        self._chosen = h.new_zeros(targets.shape, dtype=self._exact)
        self._slope = h.new_ones(rows, dtype=self._exact)
        self._sum = h.new_zeros(h.shape, dtype=self._exact) if unit else None
        self._product = torch.empty_like(h) if unit else None

    def add(self, z: Tensor, tile: Head, first: int, temperature: float, entropy: bool) -> None:
        """Join a tile of products, which are overwritten."""
        tile_lse, inside, entropies = self._softmax_(z, tile, first, temperature, entropy)
        lse = torch.logaddexp(self._lse, tile_lse)
        before, now = (self._lse - lse).exp(), (tile_lse - lse).exp()
        self._lse = lse
        self._others.mul_(before).addcmul_(inside, now)
        if entropies is not None:
            self._mean_logit.mul_(before).addcmul_(tile_lse - entropies, now)
        if self._sum is not None and self._product is not None:
            torch.mm(z.to(tile.weight.dtype), tile.weight, out=self._product)
            self._sum.mul_(before[:, None].to(self._exact)).addcmul_(
                self._product.to(self._exact), now[:, None].to(self._exact)
            )

    def result(self, head: Head, temperature: float, entropy: bool) -> Online:
        logprobs = self._chosen.double() - self._lse[:, None]
        first = self._targets[:, :1]
        sure = (self._targets == first) & (self._others < 0.5)[:, None]
        precise = torch.log1p(-self._others.clamp(max=0.5))[:, None]
        logprobs = torch.where(sure, precise, logprobs).to(self._exact)
        unit = None
        if self._sum is not None:
            own = head.weight[first[:, 0]].to(self._exact).mul_((self._others.to(self._exact) * self._slope)[:, None])
            unit = own.sub_(self._sum).mul_(head.scale / temperature)
        return Online(logprobs, (self._lse - self._mean_logit).to(self._exact) if entropy else None, unit)

    def _softmax_(
        self, z: Tensor, tile: Head, first: int, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turn a tile into its own softmax times the cap's slope, without the targets.

        Returns:
            The tile's log-sum-exp, its mass without the first target, and its entropy; each [C].
        """
        plain = tile.bias is None and tile.softcap is None and not entropy and self._targets.shape[1] == 1
        if plain and z.dtype == torch.float32 and is_available(z.device):
            return (*self._fused_(z, first, tile.scale / temperature), None)
        size = len(z) if z.is_cuda else max(1, _CACHE_BYTES // (z.shape[1] * self._exact.itemsize))
        found = [
            self._block_(z[at : at + size], slice(at, at + size), tile, first, temperature, entropy)
            for at in range(0, len(z), size)
        ]
        lse, inside, entropies = (torch.cat([f[i] for f in found]) for i in range(3))
        return lse, inside, entropies if entropy else None

    def _fused_(self, z: Tensor, first: int, factor: float) -> tuple[Tensor, Tensor]:
        column = self._targets[:, 0] - first
        column = torch.where((column >= 0) & (column < z.shape[1]), column, -1)
        found = fused_rows(z, z, column, factor)
        self._chosen[:, 0] += found.chosen  # 0 but in the target's tile
        return found.lse, found.mass

    def _block_(
        self, block: Tensor, at: slice, tile: Head, first: int, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = block.to(self._exact)
        targets = self._targets[at] - first
        here = (targets >= 0) & (targets < p.shape[1])
        column = targets.clamp(0, p.shape[1] - 1)
        rows = here[:, 0].nonzero()[:, 0]
        if p.dtype != block.dtype and targets.shape[1] == 1:
            own = p[rows]
            sharpen_(own, self._h[at][rows], tile.weight, column[rows, 0])
            p[rows] = own
        slope = shape_logits_(p, tile, temperature)
        self._chosen[at] = torch.where(here, p.gather(-1, column), self._chosen[at])
        highest = p.amax(-1)
        torch.softmax(p, -1, out=p)
        lse = highest.double() - p.amax(-1).double().log()
        entropies = torch.special.entr(p).sum(-1, dtype=torch.float64) if entropy else lse
        mass = torch.ones_like(lse)
        if len(rows):
            if slope is not None:
                self._slope[at][rows] = slope[rows, column[rows, 0]]
            p[rows, column[rows, 0]] = 0.0
            mass[rows] = p[rows].sum(-1).double()
        if slope is not None and self._sum is not None:
            p.mul_(slope)
        if p.dtype != block.dtype:
            block.copy_(p)
        return lse, mass, entropies
