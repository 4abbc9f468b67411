"""Rows of data sets to datums."""

from __future__ import annotations

from .convert import from_rows
from .report import RowNote, RowsReport

__all__ = ["RowNote", "RowsReport", "from_rows"]
