"""Tokenizers beside a model's weights; a model without one is trained on token ids (extra ``hf``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ....errors import require_extra

__all__ = ["load_tokenizer"]

_logger = logging.getLogger(__name__)


def load_tokenizer(path: str | Path, **options: Any) -> Any:
    """Return the tokenizer of a folder, or None where there is none that can be loaded; why not is logged.

    Args:
        path: folder or hub name.
        options: of ``AutoTokenizer.from_pretrained``.
    """
    transformers = require_extra("transformers", "hf", "a tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # each kind of tokenizer fails in its own way; the backend itself needs none
        _logger.info("%s has no tokenizer that can be loaded: %s: %s", path, type(error).__name__, error)
        return None
