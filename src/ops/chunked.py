"""The head's matrix products, a chunk of rows at a time: [N, V] is never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .head import Head
from .online import Online, online_pass
from .rows import Rows, entropy_gradient, nll_gradient_, row_pass_, sharpen_, to_product_

__all__ = ["HeadPass", "LateGradients"]

_ROWS, _GPU_ROWS, _NARROWEST = 1024, 4096, 64  # positions of one pass over the vocabulary; columns of a tile, at least
_CACHE_BYTES = 2**21  # a block of rows that stays in a CPU's cache from the maximum to the last write
Transform = Callable[[Tensor, Rows, slice], object]


@final
@dataclass(frozen=True, eq=False)
class LateGradients:
    """Gradients with respect to hidden states (their dtype), weight and bias (fp32 or fp64); None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@final
@dataclass(frozen=True, eq=False)
class HeadPass:
    """One head on N positions: what stays the same from chunk to chunk.

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
    def rows(self) -> int:
        """Positions of a chunk with the whole vocabulary."""
        return max(1, self.numbers // len(self.head.weight))

    @property
    def factor(self) -> float:
        """Derivative of the logits (below the soft cap) with respect to the product ``h @ W^T``."""
        return self.head.scale / self.temperature

    @property
    def exact(self) -> torch.dtype:
        """Dtype of everything but the matrix products: fp32, or fp64 for an fp64 head."""
        return torch.float64 if self.head.weight.dtype == torch.float64 else torch.float32

    def score(self, unit: bool = False) -> Online:
        """Return log-probs [N, K] and entropies [N]: 2 N H V FLOPs; with ``unit`` (K = 1) also [N, H] for 2 N H V more."""
        weight, count = self.head.weight, len(self.hidden)
        area = min(self.numbers, count * len(weight))
        rows = max(1, min(count, _GPU_ROWS if weight.is_cuda else _ROWS, area // _NARROWEST))
        width = max(1, area // rows)
        units = weight.new_empty(self.hidden.shape) if unit else None
        logprobs = weight.new_empty(self.targets.shape, dtype=self.exact)
        entropies = weight.new_empty(count, dtype=self.exact) if self.entropy else None
        for first in range(0, count, rows):
            at = slice(first, min(first + rows, count))
            h = self.hidden[at].to(weight.dtype)
            one = online_pass(h, self.head, self.targets[at], self.temperature, self.entropy, unit, width)
            if units is not None and one.unit is not None:
                units[at] = one.unit
            logprobs[at] = one.logprobs
            if entropies is not None and one.entropy is not None:
                entropies[at] = one.entropy
        return Online(logprobs, entropies, units)

    def known(self, cotangent: Callable[[Tensor, slice], Tensor], bias: bool) -> tuple[Tensor, LateGradients]:
        """Score and pull back chunk by chunk (K = 1): 6 N H V FLOPs.

        Args:
            cotangent: given a chunk's log-probs and where it lies, dL/dlogprob of it.
            bias: return its gradient.
        """
        sums = _Sums(self, True, True, bias)
        logprobs = self.hidden.new_empty(self.targets.shape, dtype=self.exact)
        for at, h, z in self._chunks(exact=True):
            rows = self._rows(z, at, self._nll(at))
            logprobs[at] = rows.logprobs
            sums.add_scaled(at, h, z, -self.factor * cotangent(rows.logprobs[:, 0], at).to(self.exact))
        return logprobs, sums.result()

    def late(
        self, cotangent: Tensor | None, of_entropy: Tensor | None, wanted: tuple[bool, bool, bool]
    ) -> LateGradients:
        """Score again and pull back: 2 N H V FLOPs for the scores and for each of hidden and weight."""
        sums = _Sums(self, *wanted)
        simple = of_entropy is None and self.targets.shape[1] == 1
        for at, h, z in self._chunks(exact=True):
            if simple and cotangent is not None:
                self._rows(z, at, self._nll(at))
                sums.add_scaled(at, h, z, -self.factor * cotangent[at, 0].to(self.exact))
            else:
                self._rows(z, at, self._mixed(at, cotangent, of_entropy))
                sums.add_scaled(at, h, z, self.hidden.new_full((len(h),), self.factor, dtype=self.exact))
        return sums.result()

    def _chunks(self, exact: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield where a chunk lies, its hidden states, and their products with the weight (as ``exact`` numbers)."""
        weight = self.head.weight
        buffer = weight.new_empty(min(self.rows, len(self.hidden)), len(weight))
        for first in range(0, len(self.hidden), self.rows):
            at = slice(first, min(first + self.rows, len(self.hidden)))
            h = self.hidden[at].to(weight.dtype)
            z = torch.mm(h, weight.T, out=buffer[: len(h)])
            if exact and z.dtype != self.exact:
                wide = z.to(self.exact)
                if self.targets.shape[1] == 1:
                    sharpen_(wide, h, weight, self.targets[at, 0])
                z = wide
            yield at, h, z

    def _rows(self, z: Tensor, at: slice, transform: Transform | None) -> Rows:
        """Run the row pass over a chunk, block by block; leave what ``transform`` makes of it in ``z``."""
        size = len(z) if z.is_cuda else max(1, _CACHE_BYTES // (z.shape[1] * self.exact.itemsize))
        found = []
        for first in range(0, len(z), size):
            block = z[first : first + size]
            exact = block.to(self.exact)
            where = slice(at.start + first, at.start + first + len(block))
            rows = row_pass_(exact, self.targets[where], self.head, self.temperature, self.entropy)
            if transform is not None:
                transform(exact, rows, where)
                if exact.dtype != block.dtype:
                    block.copy_(exact)
            found.append(rows)
        entropies = [r.entropy for r in found if r.entropy is not None]
        logprobs, others = (torch.cat([getattr(r, name) for r in found]) for name in ("logprobs", "others"))
        return Rows(logprobs, others, torch.cat(entropies) if entropies else None, None)

    def _nll(self, at: slice) -> Transform:
        return lambda p, rows, where: to_product_(nll_gradient_(p, self.targets[where], rows.others), rows.slope)

    def _mixed(self, at: slice, cotangent: Tensor | None, of_entropy: Tensor | None) -> Transform:
        def transform(p: Tensor, rows: Rows, where: slice) -> None:
            extra = None
            if of_entropy is not None:
                assert rows.entropy is not None
                extra = entropy_gradient(p, rows.entropy).mul_(of_entropy[where, None].to(p.dtype))
            g = torch.zeros_like(rows.logprobs) if cotangent is None else cotangent[where].to(p.dtype)
            p.mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, self.targets[where], g)
            if extra is not None:
                p.add_(extra)
            to_product_(p, rows.slope)

        return transform


class _Sums:
    """Gradients of hidden, weight and bias, summed over chunks in fp32 or better."""

    def __init__(self, head_pass: HeadPass, hidden: bool, weight: bool, bias: bool) -> None:
        self._weight = head_pass.head.weight
        self._scale = head_pass.head.scale
        exact = head_pass.exact
        self.hidden = torch.empty_like(head_pass.hidden) if hidden else None
        self.weight = torch.zeros_like(self._weight, dtype=exact) if weight else None
        self.bias = self._weight.new_zeros(len(self._weight), dtype=exact) if bias else None

    def add_scaled(self, at: slice, h: Tensor, dz: Tensor, scale: Tensor) -> None:
        """Add the rows of ``scale[:, None] * dz``, dz exact."""
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

    def result(self) -> LateGradients:
        return LateGradients(self.hidden, self.weight, self.bias)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply half-precision matrices into fp32; a GPU does not round in between."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
