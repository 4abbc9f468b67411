"""The check of training data: what a builder makes of chats, token by token."""

from __future__ import annotations

from .check import DataRow, check_builder
from .example import BuiltExample, built_example
from .rows import BUILDER_ROWS
from .tiny_tokenizer import TinyTokenizer

__all__ = ["BUILDER_ROWS", "BuiltExample", "DataRow", "TinyTokenizer", "built_example", "check_builder"]
