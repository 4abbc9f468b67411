"""Sparse matrices on the wire: compressed sparse rows (CSR), as protobuf and JSON both carry them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self, final

import torch
from torch import Tensor

__all__ = ["MOST_FILLED", "SparseRows"]

MOST_FILLED: Final = 1 << 27  # numbers of a sparse matrix when it is filled up


@final
@dataclass(frozen=True, eq=False)
class SparseRows:
    """A matrix of which only some cells are listed, row by row.

    Attributes:
        values: [n]; of the listed cells.
        offsets: int64 [rows + 1]; where the cells of each row begin.
        columns: int64 [n]; of the listed cells, increasing within a row.
        shape: rows and columns of the whole matrix.
    """

    values: Tensor
    offsets: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, values: Tensor, offsets: Tensor, columns: Tensor, shape: Sequence[int]) -> Self:
        """Check and return a matrix.

        Raises:
            ValueError: the parts do not fit each other, or the shape is not that of a matrix.
        """
        if len(shape) != 2 or min(shape) < 0 or max(shape) >= 1 << 31:
            raise ValueError(f"a sparse tensor of shape {list(shape)}; rows and columns were expected")
        rows, width = shape
        lengths = offsets.diff()
        fits = len(offsets) == rows + 1 and int(offsets[0]) == 0 and int(offsets[-1]) == len(columns) == len(values)
        if not fits or bool((lengths < 0).any()):
            raise ValueError("row offsets of a sparse tensor that do not fit its shape or its values")
        cells = torch.repeat_interleave(torch.arange(rows), lengths) * width + columns
        if bool(((columns < 0) | (columns >= width)).any()) or bool((cells.diff() <= 0).any()):
            raise ValueError(
                f"columns of a sparse tensor must increase within each row, and lie within 0 to {width - 1}"
            )
        return cls(values, offsets, columns, (rows, width))

    def dense(self) -> Tensor:
        """Return the whole matrix, with 0 in every cell that is not listed.

        Raises:
            ValueError: it is too large.
        """
        if math.prod(self.shape) > MOST_FILLED:
            raise ValueError(f"a sparse tensor of shape {list(self.shape)} has more than {MOST_FILLED} cells")
        whole = self.values.new_zeros(self.shape)
        whole[self._rows, self.columns] = self.values
        return whole

    def packed(self, padding: int) -> Tensor:
        """Return the listed cells of each row side by side: [rows, most cells of a row], the rest filled with ``padding``.

        Raises:
            ValueError: it is too large.
        """
        width = int(self.offsets.diff().max()) if self.shape[0] else 0
        if self.shape[0] * width > MOST_FILLED:
            raise ValueError(f"a sparse tensor with {width} cells in one of {self.shape[0]} rows is too large")
        whole = self.values.new_full((self.shape[0], width), padding)
        whole[self._rows, self._places] = self.values
        return whole

    def unpacked(self, packed: Tensor) -> SparseRows:
        """Return other values in the same cells: the inverse of `packed`."""
        return SparseRows(packed[self._rows, self._places], self.offsets, self.columns, self.shape)

    @property
    def _rows(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(self.shape[0]), self.offsets.diff())

    @property
    def _places(self) -> Tensor:
        return torch.arange(len(self.columns)) - self.offsets[self._rows]
