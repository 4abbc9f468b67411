"""GGUF files: converted to safetensors once, then loaded in a second."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ....errors import CheckpointError, require_extra
from .tokenizers import load_tokenizer

__all__ = ["cache_directory", "convert_gguf"]


def cache_directory() -> Path:
    """Where converted models are kept: ``$PULLBACK_CACHE``, else the user's cache folder."""
    given = os.environ.get("PULLBACK_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pullback"


def convert_gguf(directory: Path, gguf_file: str, cache: Path | None = None) -> Path:
    """Return a folder with the model and tokenizer of a GGUF file in transformers' own format.

    Args:
        directory: the folder of the file.
        gguf_file: its name.
        cache: where to keep the result; default `cache_directory`.

    Raises:
        CheckpointError: there is no such file.
        MissingExtraError: transformers or gguf is not installed.
    """
    source = directory / gguf_file
    if not source.is_file():
        raise CheckpointError(f"there is no GGUF file {source}")
    stat = source.stat()
    key = hashlib.sha256(f"1:{source.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    root = cache if cache is not None else cache_directory()
    folder = root / f"{source.stem}-{key}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".converting-", dir=root))
    try:
        _convert(directory, gguf_file, unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(directory: Path, gguf_file: str, folder: Path) -> None:
    transformers = require_extra("transformers", "hf", "a GGUF file")
    require_extra("gguf", "hf", "a GGUF file")
    tokenizer = load_tokenizer(directory, gguf_file=gguf_file)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf_file, dtype="float32")
    _plain(transformers, loaded).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _plain(transformers: Any, loaded: Any) -> Any:
    """The same weights in a model that was never quantized: transformers refuses to save the other."""
    import torch

    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model
