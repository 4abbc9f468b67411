"""The models that ``--model`` names, the same for every command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from ...backends.native.models.load import default_device, load_pretrained, torch_dtype
from ...errors import ConfigError
from ...testing.models.llama import random_llama
from ...testing.models.smollm2 import smollm2_file, smollm2_folder

__all__ = ["MODEL_HELP", "NamedModel", "default_device", "load_named", "smollm2_file"]

MODEL_HELP: Final = "smollm2, tiny (a random Llama), or a folder that transformers can load"


@final
@dataclass(frozen=True, eq=False)
class NamedModel:
    """A model that was loaded by name.

    Attributes:
        name: as the user gave it.
        model: a causal language model of transformers.
        tokenizer: its tokenizer; None if there is none.
        folder: where both were read from; None for a random model.
    """

    name: str
    model: Any
    tokenizer: Any = None
    folder: Path | None = None


def load_named(
    name: str, *, dtype: str = "float32", device: str | None = None, config: dict[str, Any] | None = None
) -> NamedModel:
    """Load ``smollm2``, ``tiny`` or the model in a folder.

    Args:
        name: the value of ``--model``.
        dtype: of the weights.
        device: default: a GPU if there is one.
        config: changes to the configuration of ``tiny``; the other models have their own.

    Raises:
        ConfigError: the name is none of these.
        MissingExtraError: transformers, or the package that carries SmolLM2, is not installed.
    """
    device = device or default_device()
    if name == "tiny":
        return NamedModel(name, random_llama(dtype=torch_dtype(dtype), **(config or {})).to(device))
    folder = smollm2_folder() if name == "smollm2" else Path(name)
    if not folder.is_dir():
        raise ConfigError(f"--model must be {MODEL_HELP}, got {name!r}")
    wrapped, tokenizer = load_pretrained(
        folder, gguf_file=None, lora=None, dtype=dtype, device=device, gradient_checkpointing=False
    )
    return NamedModel(name, wrapped.model, tokenizer, folder)
