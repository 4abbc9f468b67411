"""Layouts: how the tokens of B sequences lie in one tensor, padded or packed."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Final, final

import torch
from torch import Tensor

from ...errors import LengthError
from .problems import Problem
from .selection import readable, transformed

__all__ = ["Layout", "Packed", "Padded", "accurate_sum", "count_of", "count_trained"]

# So few weights are counted one by one; of more, a branch that is mispredicted costs more than a mask.
_FEW: Final = 16_384
_STRIP: Final = 1024  # so many numbers are added in fp32 before fp64 takes over


class Layout(abc.ABC):
    """The shape of the log-probs and the rows, i.e. sequences, in it.

    Attributes:
        shape: of the log-probs; one entry per token, or K per token for soft targets.
    """

    shape: tuple[int, ...]

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """B."""

    @property
    @abc.abstractmethod
    def candidates(self) -> bool:
        """Whether there are K targets per token."""

    @abc.abstractmethod
    def row_sums(self, values: Tensor) -> Tensor:
        """Sum values ([*tokens] or [*tokens, K]) within each row; float64 [B]."""

    def row_counts(self, values: Tensor) -> Tensor:
        """Sum ones or weights within each row, of whose dtype the sum is precise enough; float64 [B]."""
        return self.row_sums(values)

    @abc.abstractmethod
    def spread(self, per_row: Tensor, dim: int) -> Tensor:
        """Return one number per row, [B], so that it broadcasts over a tensor of ``dim`` dimensions in this layout."""

    def problem(self) -> Problem | None:
        """Return what may be wrong with the rows but could not be looked at."""
        return None


@final
class Padded(Layout):
    """[B, T] or [B, T, K]: a row of the tensor is a sequence."""

    def __init__(self, shape: torch.Size) -> None:
        if len(shape) not in (2, 3):
            raise LengthError(f"logprobs must be [B, T] or [B, T, K], got shape {tuple(shape)}")
        self.shape = tuple(shape)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def candidates(self) -> bool:
        return len(self.shape) == 3

    def row_sums(self, values: Tensor) -> Tensor:
        return values.sum(tuple(range(1, values.dim())), dtype=torch.float64)

    def row_counts(self, values: Tensor) -> Tensor:
        return values.sum(tuple(range(1, values.dim()))).double()

    def spread(self, per_row: Tensor, dim: int) -> Tensor:
        return per_row.view(-1, *(1,) * (dim - 1))


@final
class Packed(Layout):
    """[N] or [N, K]: the sequences end to end.

    Args:
        shape: of the log-probs.
        offsets: int64 [B + 1]; row b is ``offsets[b]:offsets[b + 1]``.
        index: int64 [N], the row of each token, where it is known already.
    """

    def __init__(self, shape: torch.Size, offsets: Tensor, index: Tensor | None = None) -> None:
        if len(shape) not in (1, 2):
            raise LengthError(f"logprobs must be [N] or [N, K], got shape {tuple(shape)}")
        self.shape, self.offsets = tuple(shape), offsets
        # Kept by hand: a compiler does not look into a cached_property.
        self._index = index
        self._lengths: Tensor | None = None

    @classmethod
    def of(cls, logprobs: Tensor, lengths: Tensor | list[int]) -> Packed:
        """Return the layout of sequences of these lengths.

        Raises:
            LengthError: they do not add up to the tokens.
        """
        known = lengths.tolist() if isinstance(lengths, Tensor) and readable(lengths) else lengths
        if not isinstance(known, Tensor) and (sum(known) != logprobs.shape[0] or min(known, default=0) < 0):
            cumulative = list(known[:1]) == [0] and known[-1] == logprobs.shape[0] and list(known) == sorted(known)
            hint = " (cumulative lengths? give cu_seqlens.diff())" if cumulative else ""
            raise LengthError(f"lengths must add up to the {logprobs.shape[0]} tokens of logprobs, got {known}{hint}")
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device=logprobs.device)
        return cls(logprobs.shape, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    @property
    def rows(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def candidates(self) -> bool:
        return len(self.shape) == 2

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row; int64 [B]."""
        if self._lengths is None:
            self._lengths = self.offsets.diff()
        return self._lengths

    @property
    def index(self) -> Tensor:
        """The row of each token; int64 [N]."""
        if self._index is None:
            self._index = torch.repeat_interleave(self.lengths, output_size=self.shape[0])
        return self._index

    def problem(self) -> Problem | None:
        if readable(self.offsets):
            return None  # `TokenBatch.from_packed` has looked
        wrong = (self.offsets[-1] != self.shape[0]) | (self.offsets.diff() < 0).any()
        return Problem(wrong, lambda: LengthError(f"lengths must add up to the {self.shape[0]} tokens of logprobs"))

    def row_sums(self, values: Tensor) -> Tensor:
        flat = (values if values.dim() == 1 else values.sum(-1, dtype=torch.float64)).double()
        if flat.requires_grad or not (readable(flat) or flat.is_cuda) or transformed():
            return flat.new_zeros(self.rows).index_add(0, self.index, flat)
        # `unsafe` skips a look at the lengths, which the batch has checked where that is free.
        return torch.segment_reduce(flat, "sum", lengths=self.lengths, unsafe=True)

    def spread(self, per_row: Tensor, dim: int) -> Tensor:
        flat = per_row.index_select(0, self.index)
        return flat if dim == 1 else flat[:, None]


def accurate_sum(values: Tensor) -> Tensor:
    """Return the sum of all ``values``; float64, 0-d, an error of 1e-8 of the magnitudes; 4e-7 where all values are equal."""
    if transformed() or values.dtype != torch.float32 or not values.is_contiguous():
        return values.sum(dtype=torch.float64)
    if values.numel() < 16 * _STRIP or values.numel() % _STRIP:
        return values.sum(dtype=torch.float64)
    return values.view(-1, _STRIP).sum(1).sum(dtype=torch.float64)


def count_of(ones: Tensor) -> Tensor:
    """Return the sum of ones and zeros; float64, 0-d. fp32 holds whole numbers below 2^24 exactly, and adds faster."""
    exact = not transformed() and ones.numel() < 2**24
    return ones.sum().double() if exact else ones.sum(dtype=torch.float64)


def count_trained(weights: Tensor | None, indicator: Callable[[], Tensor]) -> Tensor:
    """Return how many positions are trained; float64, 0-d.

    Args:
        weights: of which each that is not 0 is a position; None: that is not so, or another way is faster.
        indicator: gives ones and zeros, one per position.
    """
    if weights is not None and readable(weights) and weights.numel() <= _FEW:
        return torch.count_nonzero(weights).double()
    return count_of(indicator())
