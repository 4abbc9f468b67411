"""Loading a transformers model and its tokenizer from a folder (extra ``hf``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ....errors import ConfigError, require_extra
from .gguf import convert_gguf
from .hf import HFModel
from .lora import add_lora

__all__ = ["load_pretrained", "torch_dtype"]


def load_pretrained(
    path: str | Path,
    *,
    gguf_file: str | None,
    lora: Any,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    gradient_checkpointing: bool,
    compile: str | None = None,
) -> tuple[HFModel, Any]:
    """Load a model and its tokenizer (None where the folder has none); see `TorchBackend.from_pretrained`."""
    transformers = require_extra("transformers", "hf", "TorchBackend.from_pretrained")
    if gguf_file is not None:
        path = convert_gguf(Path(path), gguf_file)
    device = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype(dtype))
    if lora is not None:
        model = add_lora(model, lora)
    return HFModel(model.to(device), gradient_checkpointing=gradient_checkpointing, compile=compile), _tokenizer(
        transformers, path
    )


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return ``"bfloat16"`` and its like as a torch dtype."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"dtype must name a floating-point torch dtype such as 'float32' or 'bfloat16', got {dtype!r}"
        )
    return found


def _tokenizer(transformers: Any, path: str | Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return None  # a folder with weights only is fine: the backend itself needs no tokenizer
