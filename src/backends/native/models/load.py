"""Loading a transformers model, or an adapter on its base, and the tokenizer from a folder (extra ``hf``)."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ....errors import CheckpointError, ConfigError, UnsupportedError, require_extra
from .facts.quantized import require_adapter
from .gguf import convert_gguf
from .hf import HFModel
from .layers import coverage
from .lora import add_lora, quiet_peft
from .tokenizers import load_tokenizer

__all__ = ["default_device", "load_pretrained", "torch_dtype"]

_logger = logging.getLogger(__name__)
_NO_CAUSAL_CLASS: Final = re.compile(r"Unrecognized configuration class <class '[\w.]*\.(\w+)'>")
_HUB_NAME: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OF_COMMANDS: Final = {
    "tiny": "TorchBackend(HFModel(pullback.testing.random_llama()))",
    "smollm2": "TorchBackend.from_pretrained(pullback.testing.smollm2_folder())",
}
_RAISED: Final = (OSError, ValueError, LookupError, ImportError, AttributeError, TypeError, RuntimeError)


def default_device() -> str:
    """Return where a model goes unless another device is named: this process's GPU where there is one."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def load_pretrained(
    path: str | Path,
    *,
    gguf_file: str | None,
    lora: Any,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    gradient_checkpointing: bool,
    compile: str | None = None,
    base: str | Path | None = None,
) -> tuple[HFModel, Any]:
    """Load a model and its tokenizer (None where the folder has none); see `TorchBackend.from_pretrained`."""
    transformers = require_extra("transformers", "hf", "TorchBackend.from_pretrained")
    _require_path(path)
    if gguf_file is not None:
        path = convert_gguf(Path(path), gguf_file)
    device = torch.device(default_device() if device is None else device)
    folders, dtype = [path], torch_dtype(dtype)
    if _is_adapter(path):
        config = _adapter_config(path, lora)
        folders.append(_base_of(path, config, base))
        model = _add_saved(_load(transformers, folders[-1], dtype), path, config)
    elif base is not None:
        raise ConfigError(f"base= names the base of an adapter, and {path} is none: it has no adapter_config.json")
    else:
        model = _load(transformers, path, dtype)
        if lora is None:
            require_adapter(model)
        else:
            model = add_lora(model, lora)
    wrapped = HFModel(model.to(device), gradient_checkpointing=gradient_checkpointing, compile=compile)
    return wrapped, next((t for t in map(load_tokenizer, folders) if t is not None), None)


def _require_path(path: Any) -> None:
    """Refuse a model in place of its folder, and a name that only the commands know."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(
            f"from_pretrained takes a folder or a name, got {type(path).__name__}; a model that is loaded already is wrapped: "
            "TorchBackend(pullback.backends.HFModel(model))"
        )
    if str(path) in _OF_COMMANDS and not Path(path).exists():
        raise CheckpointError(
            f"there is no folder {path}: {str(path)!r} is a name of the commands; in Python: {_OF_COMMANDS[str(path)]}"
        )


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return ``"bfloat16"`` and its like as a torch dtype."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"dtype must name a floating-point torch dtype such as 'float32' or 'bfloat16', got {dtype!r}"
        )
    return found


def _load(transformers: Any, path: str | Path, dtype: torch.dtype) -> Any:
    """Load a causal language model all of whose weights are there."""
    if not Path(path).exists() and not _HUB_NAME.fullmatch(str(path)):
        raise CheckpointError(f"there is no folder {path}")
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except _RAISED as error:
        raise _unloadable(path, error) from error
    missing = sorted(set(found["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise CheckpointError(f"{path} lacks weights of {type(model).__name__}, which would be random: {missing[:5]}")
    return model


def _unloadable(path: str | Path, error: Exception) -> Exception:
    no_class = _NO_CAUSAL_CLASS.search(str(error))
    if no_class:
        kind = no_class[1].removesuffix("Config")
        return UnsupportedError(f"{path} is a {kind} model, and transformers has no causal language model of that kind")
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError) and not Path(path).exists():
        cached = ", ".join(_cached_names()) or "nothing"
        return CheckpointError(
            f"there is no folder {path}, and no model of that name could be loaded from the hub, of which the cache of this "
            f"machine holds {cached}: {first}"
        )
    if isinstance(error, OSError):
        return CheckpointError(f"{path} holds no model that transformers can load: {first}")
    return UnsupportedError(f"{path} cannot be loaded by transformers as a causal language model: {first}")


def _cached_names() -> list[str]:
    """Return the names of the hub's models that are on this machine."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except (CacheNotFound, OSError, ValueError):
        return []


def _is_adapter(path: str | Path) -> bool:
    if not Path(path).exists() and not _HUB_NAME.fullmatch(str(path)):
        return False
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(str(path)) is not None
    except (OSError, ValueError):
        return False  # no folder and no name of the hub; loading says so


def _adapter_config(path: str | Path, lora: Any) -> Any:
    """Return the config of a saved adapter; ``lora`` may say of it only that it drops nothing out."""
    config = require_extra("peft", "hf", "an adapter").PeftConfig.from_pretrained(str(path))
    given = dict(lora) if isinstance(lora, Mapping) else {"lora": lora} if lora is not None else {}
    if given and set(given) != {"lora_dropout"}:
        raise ConfigError(
            f"{path} is an adapter, which is loaded and trained on; lora={lora!r} would be another one. Leave lora out, or "
            "train a new adapter on the base"
        )
    for name, value in given.items():
        setattr(config, name, value)
    return config


def _base_of(path: str | Path, config: Any, base: str | Path | None) -> str | Path:
    found: str | Path | None = base if base is not None else config.base_model_name_or_path
    if not found:
        raise ConfigError(f"the adapter of {path} does not name the model that it is on: pass base=<its folder>")
    return found


def _add_saved(model: Any, path: str | Path, config: Any) -> nn.Module:
    """Load an adapter's weights onto its base.

    Raises:
        CheckpointError: they are of another base, or not all that was trained.
    """
    if list(Path(path).glob("trained_beside_adapter*")):
        raise CheckpointError(
            f"{path} holds weights beside the adapter: load its base with lora={str(path)!r}, then load_state"
        )
    peft = require_extra("peft", "hf", "an adapter")
    try:
        with quiet_peft():
            warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
            adapted: nn.Module = peft.PeftModel.from_pretrained(model, str(path), config=config, is_trainable=True)
    except (RuntimeError, ValueError, LookupError, OSError, UserWarning) as error:
        first = str(error).strip().splitlines()[:2]
        raise CheckpointError(
            f"the adapter of {path} is not one of {type(model).__name__}: {' '.join(first)}"
        ) from error
    _logger.info("%s", coverage(adapted))
    return adapted
