"""The one softmax of the head: over a tile of the vocabulary, in place, and joined from tile to tile."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
from torch import Tensor

from .head import Head

__all__ = ["Tile", "TileSoftmax", "exact_dtype", "is_available", "p_log_p", "softmax_"]

_CACHE_BYTES = 2**21  # a block of rows that stays in a CPU core's cache from the maximum to the last write
_TRITON_BLOCK = 2048
_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Tile:
    """Some columns of the vocabulary for C positions.

    Attributes:
        hidden: [C, H] in the weight's dtype.
        head: detached, with the whole vocabulary.
        targets: int64 [C, K], in the whole vocabulary.
        columns: those of the tile.
        temperature: divides the logits.
        entropy: compute it.
        rounded: the products were rounded to half precision.
        partial: the head's own vocabulary is part of a larger one, so that targets may lie outside of it.
    """

    hidden: Tensor
    head: Head
    targets: Tensor
    columns: slice
    temperature: float = 1.0
    entropy: bool = False
    rounded: bool = False
    partial: bool = False

    def rows(self, at: slice) -> Tile:
        """Return the tile of some of the positions."""
        return replace(self, hidden=self.hidden[at], targets=self.targets[at])

    @property
    def weight(self) -> Tensor:
        """The tile's part of the weight, [v, H]."""
        return self.head.weight[self.columns]

    @property
    def elementary(self) -> bool:
        """Whether one factor makes logits of products, and one log-prob per position is all that is asked for."""
        return self.head.bias is None and self.head.softcap is None and not self.entropy and self.targets.shape[1] == 1

    def first_targets(self) -> tuple[Tensor, Tensor]:
        """Return the positions whose first target lies in the tile, and its column there."""
        column = self.targets[:, 0] - self.columns.start
        width = self.columns.stop - self.columns.start
        if width == len(self.head.weight) and not self.partial:  # all of them: a GPU need not count
            return torch.arange(len(column), device=column.device), column
        rows = ((column >= 0) & (column < width)).nonzero()[:, 0]
        return rows, column[rows]


class TileSoftmax(NamedTuple):
    """The softmax of a tile, or of several that were joined, by rows.

    Attributes:
        lse: fp64 [C]; log-sum-exp of the logits.
        one_minus_target: fp64 [C]; mass of the tile's own softmax without the first target, summed without it (1 - p
            would cancel); 1 where the target lies elsewhere.
        target_logits: fp32 (fp64) [C, K]; 0 where they lie elsewhere.
        entropy: fp64 [C], nats, of the tile's own softmax; None if it was not asked for.
        slope: [C, v]; derivative of the soft cap, for as long as the block is at hand; None without one.
    """

    lse: Tensor
    one_minus_target: Tensor
    target_logits: Tensor
    entropy: Tensor | None = None
    slope: Tensor | None = None

    @classmethod
    def empty(cls, targets: Tensor, dtype: torch.dtype, entropy: bool) -> TileSoftmax:
        """Return what a tile without columns would give."""
        zero = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        logits = torch.zeros(targets.shape, dtype=dtype, device=targets.device)
        return cls(torch.full_like(zero, -torch.inf), zero, logits, zero if entropy else None)

    @classmethod
    def stack(cls, blocks: Sequence[TileSoftmax]) -> TileSoftmax:
        """Put blocks of rows under each other."""
        entropies = [block.entropy for block in blocks if block.entropy is not None]
        lse, rest, logits = (torch.cat([block[i] for block in blocks]) for i in range(3))  # type: ignore[misc]
        return cls(lse, rest, logits, torch.cat(entropies) if entropies else None)

    def join(self, other: TileSoftmax) -> tuple[TileSoftmax, Tensor, Tensor]:
        """Return the softmax over both tiles' columns, and the shares of the two in it, fp64 [C]."""
        lse = torch.logaddexp(self.lse, other.lse)
        mine, theirs = (self.lse - lse).exp(), (other.lse - lse).exp()
        rest = (self.one_minus_target * mine).addcmul_(other.one_minus_target, theirs)
        entropy = None
        if self.entropy is not None and other.entropy is not None:
            entropy = (self.entropy * mine).addcmul_(other.entropy, theirs)
            entropy.add_(torch.special.entr(mine)).add_(torch.special.entr(theirs))
        return TileSoftmax(lse, rest, self.target_logits + other.target_logits, entropy), mine, theirs

    def logprobs(self, targets: Tensor) -> Tensor:
        """Return log-probs of the targets, [C, K], where the tile is the whole vocabulary.

        A log-prob near zero comes from the sum of the other tokens' probabilities, ``log1p(-sum)``: it keeps its relative
        precision where ``logit - logsumexp`` has none left.
        """
        confident = (targets == targets[:, :1]) & (self.one_minus_target < 0.5)[:, None]
        precise = torch.log1p(-self.one_minus_target.clamp(max=0.5))[:, None]
        logprobs = self.target_logits.double() - self.lse[:, None]
        return torch.where(confident, precise, logprobs).to(self.target_logits.dtype)


Transform = Callable[[Tensor, TileSoftmax, slice], object]


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of everything but the matrix products: fp32, or fp64 for an fp64 head."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_(z: Tensor, tile: Tile, transform: Transform | None = None) -> TileSoftmax:
    """Turn products ``h @ W^T`` of a tile into its own softmax, 0 at the first target, in place.

    Args:
        z: any float dtype [C, v]; computed in fp32 or better, a block of rows at a time.
        tile: where it comes from; scale, bias, soft cap and temperature are applied here.
        transform: given a block's probabilities (fp32 or better, to be changed in place), its sums, and where its rows lie.
    """
    exact = exact_dtype(z.dtype)
    bytes_each = exact.itemsize * (1 if tile.head.softcap is None else 2) + (z.itemsize if z.dtype != exact else 0)
    size = len(z) if z.is_cuda else max(1, _CACHE_BYTES // (z.shape[1] * bytes_each))
    blocks = []
    for first in range(0, len(z), size):
        at = slice(first, min(first + size, len(z)))
        p = z[at].to(exact)
        blocks.append(_block_(p, tile.rows(at), at, transform))
        if z.dtype != exact:
            z[at] = p
    return blocks[0] if len(blocks) == 1 else TileSoftmax.stack(blocks)


def _block_(z: Tensor, tile: Tile, at: slice, transform: Transform | None) -> TileSoftmax:
    if tile.rounded:
        recompute_target_logit_(z, tile)
    fused = tile.elementary and z.dtype == torch.float32 and is_available(z.device)
    softmax = fused_softmax_(z, tile) if fused else plain_softmax_(z, tile)
    if transform is not None:
        transform(z, softmax, at)
    return softmax._replace(slope=None)


def recompute_target_logit_(z: Tensor, tile: Tile) -> None:
    """Put the first targets' own products in fp32 among half-precision ones: rounding them would show in full.

    A product rounded to bf16 is off by up to 0.4 %; in the sum over the vocabulary such errors average out, in the
    target's own logit they do not.
    """
    rows, column = tile.first_targets()
    if len(rows):
        z[rows, column] = (tile.hidden[rows].float() * tile.weight[column].float()).sum(-1)


def plain_softmax_(z: Tensor, tile: Tile) -> TileSoftmax:
    """Do the softmax of a block (fp32 or fp64 [C, v]) by PyTorch's operators: the definition, and the kernel's oracle."""
    slope = shape_logits_(z, tile)
    column = tile.targets - tile.columns.start
    here = (column >= 0) & (column < z.shape[1])
    logits = torch.where(here, z.gather(-1, column.clamp(0, z.shape[1] - 1)), 0.0)
    highest = z.amax(-1).double()
    torch.softmax(z, -1, out=z)
    lse = highest - z.amax(-1).double().log()
    entropy = p_log_p(z).sum(-1, dtype=torch.float64).neg_() if tile.entropy else None
    return TileSoftmax(lse, _without_target_(z, tile), logits, entropy, slope)


def _without_target_(p: Tensor, tile: Tile) -> Tensor:
    """Leave the first targets out, in place, and return the mass that is left, fp64 [C]."""
    rows, column = tile.first_targets()
    if len(rows) == len(p):
        return p.scatter_(-1, column[:, None], 0.0).sum(-1).double()
    p[rows, column] = 0.0
    rest = p.new_ones(len(p), dtype=torch.float64)
    few = 16 * len(rows) < len(p)  # otherwise their copy would cost memory
    rest[rows] = (p[rows].sum(-1) if few else p.sum(-1)[rows]).double()
    return rest


def p_log_p(p: Tensor) -> Tensor:
    """Return ``p log p``, 0 at p = 0; several times as fast as ``torch.special.entr`` on a CPU."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log_().mul_(p)


def shape_logits_(z: Tensor, tile: Tile) -> Tensor | None:
    """Make logits of products, in place; return the slope of the soft cap."""
    head, slope = tile.head, None
    if head.scale != 1.0:
        z.mul_(head.scale)
    if head.bias is not None:
        z.add_(head.bias[tile.columns].to(z.dtype))
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = z.square().neg_().add_(1)
        z.mul_(head.softcap)
    if tile.temperature != 1.0:
        z.div_(tile.temperature)
    return slope


def fused_softmax_(z: Tensor, tile: Tile) -> TileSoftmax:
    """Do what `plain_softmax_` does for an elementary tile in one Triton kernel: two readings of z, one writing."""
    count, width = z.shape
    column = tile.targets[:, 0] - tile.columns.start
    column = torch.where((column >= 0) & (column < width), column, -1)
    highest, total, rest, logits = (z.new_zeros(count, dtype=torch.float32) for _ in range(4))
    from .triton_kernel import row_softmax

    factor = tile.head.scale / tile.temperature
    row_softmax[(count,)](z, column, highest, total, rest, logits, width, z.stride(0), factor, BLOCK=_TRITON_BLOCK)
    lse = highest.double() + total.double().log()
    return TileSoftmax(lse, torch.where(column >= 0, rest.double(), 1.0), logits[:, None])


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernel compiles on a device and gives there what PyTorch gives; tried once."""
    if device.type != "cuda":
        return False
    try:
        return agrees(device)
    except Exception as error:  # no Triton, no compiler, an old driver: PyTorch's operators always work
        _logger.warning("the fused softmax is not used: %s: %s", type(error).__name__, error)
        return False


def agrees(device: torch.device) -> bool:
    """Compare kernel and oracle on a small tile."""
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(8, 3000, generator=generator) * 5).to(device)
    targets = torch.tensor([-1, 0, 2999, 5, -1, 2048, 2047, 7], device=device)[:, None] + 10
    hidden, weight = z.new_empty(8, 1), z.new_empty(3010, 1)
    tile = Tile(hidden, Head(weight, scale=0.7), targets, slice(10, 3010))
    ours, theirs = z.clone(), z.clone()
    our_sums, their_sums = fused_softmax_(ours, tile)[:3], plain_softmax_(theirs, tile)[:3]
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(our_sums, their_sums, strict=True))
    if not (same and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)):
        _logger.warning("the fused softmax is not used: it does not give PyTorch's result on %s", device)
        return False
    return True
