"""The models that ``--model`` names, the same for every command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from ...backends.native.models.load import default_device, load_pretrained, torch_dtype
from ...errors import ConfigError
from ...testing.models.llama import random_llama
from ...testing.models.smollm2 import smollm2_file, smollm2_folder

__all__ = [
    "CONFIG_HELP",
    "DEVICE_HELP",
    "MODEL_HELP",
    "NamedModel",
    "config_named",
    "default_device",
    "folder_named",
    "load_named",
    "smollm2_file",
]

MODEL_HELP: Final = "smollm2, tiny (a random Llama), or a folder that transformers can load"
CONFIG_HELP: Final = f"{MODEL_HELP}, or a config.json of transformers"
DEVICE_HELP: Final = "device to run on, e.g. cpu or cuda:1 (default: a GPU where there is one)"


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
        ConfigError: the name is none of these, or there is no such device here.
        MissingExtraError: transformers, or the package that carries SmolLM2, is not installed.
    """
    device = device or default_device()
    require_device(device)
    if name == "tiny":
        return NamedModel(name, random_llama(dtype=torch_dtype(dtype), **(config or {})).to(device))
    folder = folder_named(name, f"--model must be {MODEL_HELP}")
    wrapped, tokenizer = load_pretrained(
        folder, gguf_file=None, lora=None, dtype=dtype, device=device, gradient_checkpointing=False
    )
    return NamedModel(name, wrapped.model, tokenizer, folder)


def require_device(device: str) -> None:
    """Check that tensors can be made on a device.

    Raises:
        ConfigError: it is no device, or this machine or this build of torch has none.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"--device {device} cannot be used here: {said}; here is: {default_device()}") from error


def config_named(name: str) -> Any:
    """Return the config of the model that ``--model`` names, or of a JSON file.

    Raises:
        ConfigError: the name is none of these, or the file is no config.
        CheckpointError: the folder holds no config.
        MissingExtraError: transformers, or the package that carries SmolLM2, is not installed.
    """
    from ...backends.native.distributed.budget.outline import read_config  # it brings sharding, needed only here

    if name == "tiny":
        return random_llama().config
    file = Path(name)
    return read_config(file if file.is_file() else folder_named(name, f"--model must be {CONFIG_HELP}"))


def folder_named(name: str, expected: str) -> Path:
    """Return the folder of ``smollm2``, or the one that has this name; names of a hub are not looked up.

    Args:
        name: as the user gave it.
        expected: what it should have been, for the error.

    Raises:
        ConfigError: there is no such folder.
        MissingExtraError: the package that carries SmolLM2 is not installed.
    """
    folder = smollm2_folder() if name == "smollm2" else Path(name)
    if not folder.is_dir():
        raise ConfigError(f"{expected}, got {name!r}, which is no folder here; names of a hub are not looked up")
    return folder
