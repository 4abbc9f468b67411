"""The head's matrix products, a chunk of rows or a tile of columns at a time: [N, V] is never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from .head import Head
from .softmax import Tile, TileSoftmax, Transform, exact_dtype, p_log_p, softmax_

__all__ = ["GradientSums", "HeadGradients", "HeadPass", "Scores"]

_ROWS, _GPU_ROWS, _NARROWEST = 1024, 4096, 64  # positions of one pass over the vocabulary; columns of a tile, at least
_HALF = (torch.bfloat16, torch.float16)


class Scores(NamedTuple):
    """What scoring gives for N positions.

    Attributes:
        logprobs: fp32 (fp64) [N, K].
        entropy: [N], nats; None if it was not asked for.
        gradient: ``d logprob / d hidden`` [N, H] for K = 1; None if it was not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    gradient: Tensor | None


@final
@dataclass(frozen=True, eq=False)
class HeadGradients:
    """Gradients with respect to hidden states (their dtype), weight and bias (fp32 or fp64); None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@final
@dataclass(frozen=True, eq=False)
class HeadPass:
    """A head and the N positions that it scores: what stays the same from chunk to chunk.

    Attributes:
        hidden: [N, H], detached, any dtype.
        head: detached; its weight in the dtype of the matrix products.
        targets: int64 [N, K].
        temperature: divides the logits.
        entropy: whether it is computed.
        numbers: logits held at once.
    """

    hidden: Tensor
    head: Head
    targets: Tensor
    temperature: float
    entropy: bool
    numbers: int

    @property
    def factor(self) -> float:
        """Derivative of the logits (below the soft cap) with respect to the product ``h @ W^T``."""
        return self.head.scale / self.temperature

    @property
    def exact(self) -> torch.dtype:
        """Dtype of everything but the matrix products."""
        return exact_dtype(self.head.weight.dtype)

    def score(self, gradient: bool = False) -> Scores:
        """Return log-probs and entropies: 2 N H V FLOPs; with ``gradient`` (K = 1) also that for 2 N H V more."""
        weight, count = self.head.weight, len(self.hidden)
        area = min(self.numbers, count * len(weight))
        rows = max(1, min(count, _GPU_ROWS if weight.is_cuda else _ROWS, area // _NARROWEST))
        scores = Scores(
            weight.new_empty(self.targets.shape, dtype=self.exact),
            weight.new_empty(count, dtype=self.exact) if self.entropy else None,
            weight.new_empty(self.hidden.shape) if gradient else None,
        )
        for first in range(0, count, rows):
            at = slice(first, min(first + rows, count))
            for whole, part in zip(scores, self._score_rows(at, max(1, area // rows), gradient), strict=True):
                if whole is not None and part is not None:
                    whole[at] = part
        return scores

    def one_pass(self, cotangent: Callable[[Tensor, slice], Tensor], bias: bool) -> tuple[Tensor, HeadGradients]:
        """Score and pull back chunk by chunk (K = 1): 6 N H V FLOPs.

        Args:
            cotangent: given a chunk's log-probs and where it lies, dL/dlogprob of it.
            bias: return its gradient.
        """
        sums = GradientSums(self, True, True, bias)
        logprobs = self.hidden.new_empty(self.targets.shape, dtype=self.exact)
        for at, z, tile in self.chunks():
            logprobs[at] = softmax_(z, tile, _nll_gradient(tile)).logprobs(tile.targets)
            sums.add(at, tile.hidden, z, -self.factor * cotangent(logprobs[at, 0], at).to(self.exact))
        return logprobs, sums.result()

    def recompute(
        self, cotangent: Tensor | None, of_entropy: Tensor | None, needed: tuple[bool, bool, bool]
    ) -> HeadGradients:
        """Score again and pull back: 2 N H V FLOPs for the scores and for each of hidden and weight.

        Args:
            cotangent: dL/dlogprob, [N, K], or None.
            of_entropy: dL/dentropy, [N], or None.
            needed: which of hidden, weight and bias get a gradient.
        """
        sums = GradientSums(self, *needed)
        for at, z, tile in self.chunks():
            if of_entropy is None and cotangent is not None and self.targets.shape[1] == 1:
                softmax_(z, tile, _nll_gradient(tile))
                scale = -self.factor * cotangent[at, 0].to(self.exact)
            else:
                given = None if cotangent is None else cotangent[at]
                softmax_(z, tile, _full_gradient(tile, given, None if of_entropy is None else of_entropy[at]))
                scale = z.new_full((len(z),), self.factor)
            sums.add(at, tile.hidden, z, scale)
        return sums.result()

    def _score_rows(self, at: slice, width: int, gradient: bool) -> Scores:
        """Score positions by an online softmax over tiles of ``width`` columns: each tile of W is read once."""
        h, targets = self.hidden[at].to(self.head.weight.dtype), self.targets[at]
        sums = _FrozenGradient(h, self.exact) if gradient else None
        joined = self._join(h, targets, width, sums)  # the products are gone before `result` takes rows of W
        entropy = None if joined.entropy is None else joined.entropy.to(self.exact)
        result = None if sums is None else sums.result(self.head.weight[targets[:, 0]], joined, self.factor)
        return Scores(joined.logprobs(targets), entropy, result)

    def _join(self, h: Tensor, targets: Tensor, width: int, sums: _FrozenGradient | None) -> TileSoftmax:
        weight = self.head.weight
        wide = h.is_cuda and h.dtype in _HALF  # a GPU gives their products in fp32, unrounded
        scratch = h.new_empty(0 if wide else len(h) * min(width, len(weight)))
        joined = TileSoftmax.empty(targets, self.exact, self.entropy)
        for first in range(0, len(weight), width):
            tile = self._tile(h, targets, slice(first, min(first + width, len(weight))), rounded=not wide)
            if wide:
                z = torch.mm(h, tile.weight.T, out_dtype=torch.float32)
            else:
                z = torch.mm(h, tile.weight.T, out=scratch[: len(h) * len(tile.weight)].view(len(h), -1))
            joined, before, now = joined.join(softmax_(z, tile, None if sums is None else sums.through_cap(tile)))
            if sums is not None:
                sums.add(z, tile, before, now)
        return joined

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tile]]:
        """Yield where a chunk of rows lies, and its products with the whole weight, as fp32 or better."""
        weight, count = self.head.weight, len(self.hidden)
        rows = max(1, self.numbers // max(1, len(weight)))
        buffer = weight.new_empty(min(rows, count), len(weight))
        for first in range(0, count, rows):
            at = slice(first, min(first + rows, count))
            h = self.hidden[at].to(weight.dtype)
            z = torch.mm(h, weight.T, out=buffer[: len(h)])
            yield at, z.to(self.exact), self._tile(h, self.targets[at], slice(0, len(weight)), rounded=True)

    def _tile(self, h: Tensor, targets: Tensor, columns: slice, rounded: bool) -> Tile:
        rounded = rounded and h.dtype in _HALF and targets.shape[1] == 1
        return Tile(h, self.head, targets, columns, self.temperature, self.entropy, rounded)


def _nll_gradient(tile: Tile) -> Transform:
    """Turn a softmax into ``p - onehot(t)``, the gradient of -logprob with respect to the logits.

    The subtraction comes before the product with W: ``p @ W - W[t]`` cancels where the model is confident.
    """

    def transform(p: Tensor, softmax: TileSoftmax, at: slice) -> None:
        p.scatter_(-1, tile.targets[at], -softmax.one_minus_target[:, None].to(p.dtype))
        if softmax.slope is not None:
            p.mul_(softmax.slope)

    return transform


def _full_gradient(tile: Tile, cotangent: Tensor | None, of_entropy: Tensor | None) -> Transform:
    """Turn a softmax into ``sum_k g_k (onehot(t_k) - p) - g_entropy p (log p + entropy)``."""

    def transform(p: Tensor, softmax: TileSoftmax, at: slice) -> None:
        targets = tile.targets[at]
        p.scatter_(-1, targets[:, :1], softmax.logprobs(targets)[:, :1].exp())
        extra = None
        if of_entropy is not None and softmax.entropy is not None:
            extra = p_log_p(p).addcmul_(p, softmax.entropy[:, None].to(p.dtype))
            extra.mul_(-of_entropy[at, None].to(p.dtype))
        g = p.new_zeros(targets.shape) if cotangent is None else cotangent[at].to(p.dtype)
        p.mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, targets, g)
        if extra is not None:
            p.add_(extra)
        if softmax.slope is not None:
            p.mul_(softmax.slope)

    return transform


@final
class _FrozenGradient:
    """``d logprob / d hidden = ((1 - p_t) W[t] - sum_{v != t} p_v W[v]) factor``, the sum joined from tile to tile.

    The target's own entry enters once, with ``1 - p_t`` summed from the others: ``W[t] - p @ W`` would cancel where the
    model is confident.
    """

    def __init__(self, h: Tensor, exact: torch.dtype) -> None:
        self._sum = torch.zeros_like(h, dtype=exact)
        self._product = torch.empty_like(h)
        self._slope = h.new_ones(len(h), dtype=exact)

    def through_cap(self, tile: Tile) -> Transform:
        """Return what multiplies a tile's softmax by the slope of the soft cap."""

        def transform(p: Tensor, softmax: TileSoftmax, at: slice) -> None:
            if softmax.slope is not None:
                rows, column = tile.rows(at).first_targets()
                self._slope[at][rows] = softmax.slope[rows, column]
                p.mul_(softmax.slope)

        return transform

    def add(self, p: Tensor, tile: Tile, before: Tensor, now: Tensor) -> None:
        """Join a tile's ``p @ W``; ``before`` and ``now`` are the shares of the earlier tiles and of this one."""
        exact = self._sum.dtype
        torch.mm(p.to(tile.weight.dtype), tile.weight, out=self._product)
        self._sum.mul_(before[:, None].to(exact)).addcmul_(self._product.to(exact), now[:, None].to(exact))

    def result(self, target_weight: Tensor, joined: TileSoftmax, factor: float) -> Tensor:
        """Return the gradient, [C, H]."""
        share = joined.one_minus_target.to(self._sum.dtype) * self._slope
        return target_weight.to(self._sum.dtype).mul_(share[:, None]).sub_(self._sum).mul_(factor)


@final
class GradientSums:
    """Gradients of hidden, weight and bias, summed over chunks in fp32 or better."""

    def __init__(self, head_pass: HeadPass, hidden: bool, weight: bool, bias: bool) -> None:
        self._weight = head_pass.head.weight
        self._scale = head_pass.head.scale
        exact = head_pass.exact
        self.hidden = torch.empty_like(head_pass.hidden) if hidden else None
        self.weight = torch.zeros_like(self._weight, dtype=exact) if weight else None
        self.bias = self._weight.new_zeros(len(self._weight), dtype=exact) if bias else None

    def add(self, at: slice, h: Tensor, dz: Tensor, scale: Tensor) -> None:
        """Add the rows of ``scale[:, None] * dz``, dz in fp32 or better."""
        if self.bias is not None:
            self.bias += (scale / self._scale) @ dz
        if dz.dtype == self._weight.dtype:  # the factor goes onto the narrow side
            if self.hidden is not None:
                self.hidden[at] = (dz @ self._weight) * scale[:, None]
            if self.weight is not None:
                torch.addmm(self.weight, dz.T, h * scale[:, None], out=self.weight)
            return
        largest = scale.abs().amax().clamp(min=torch.finfo(scale.dtype).tiny)
        peak = largest.log2().ceil().exp2()  # fp16 has no room for small cotangents; a power of two does not round
        half = dz.mul_((scale / peak)[:, None]).to(self._weight.dtype)  # rounded once
        if self.hidden is not None:
            self.hidden[at] = (half @ self._weight).to(scale.dtype) * peak
        if self.weight is not None:
            self.weight += _product(half.T, h) * peak

    def result(self) -> HeadGradients:
        return HeadGradients(self.hidden, self.weight, self.bias)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply half-precision matrices into fp32; a GPU does not round in between."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
