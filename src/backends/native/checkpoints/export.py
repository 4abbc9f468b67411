"""Getting a trained model out, as a folder that transformers or peft loads (extra ``hf``)."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import CheckpointError, ConfigError, UnsupportedError
from ..models.facts.quantized import is_quantized
from ..models.hf import HFModel
from .checkpoint import ADAPTER
from .files import unfinished, write_tensors

__all__ = ["export_model"]

_logger = logging.getLogger(__name__)


def export_model(
    model: nn.Module, tokenizer: Any, folder: Path, *, merged: bool, overwrite: bool, dtype: torch.dtype | None = None
) -> str:
    """Write weights, config and tokenizer into a folder, atomically; return it.

    Args:
        model: as the backend has it; it is not changed.
        tokenizer: None is left out.
        folder: where to.
        merged: a LoRA adapter is added to the weights below it; else it is written alone, in PEFT's format.
        overwrite: replace what is there.
        dtype: of whole weights; None: as they are.

    Raises:
        CheckpointError: the folder exists.
        ConfigError: a dtype for an adapter alone.
        UnsupportedError: not a model of transformers, or one whose adapter cannot be written so.
    """
    if not isinstance(model, HFModel):
        raise UnsupportedError(
            f"export writes models of transformers (HFModel), not {type(model).__name__}: use save_weights"
        )
    alone = model.is_lora and not merged
    if alone and dtype is not None:
        raise ConfigError(f"dtype={dtype} is of merged weights; an adapter alone is written as it is")
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; choose another folder or pass overwrite=True")
    with unfinished(folder) as path:
        if alone:
            _write_adapter(model, path)
        else:
            _write_whole(model, path, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    return str(folder)


def _write_adapter(model: HFModel, folder: Path) -> None:
    outside = sorted(model.trained_outside())
    if outside:
        raise UnsupportedError(
            f"weights are trained beside the adapter, so it is not all: pass merged=True: {outside[:5]}"
        )
    write_tensors(model.adapter_weights(), folder / ADAPTER)
    model.write_adapter_config(folder)


def _write_whole(model: HFModel, folder: Path, dtype: torch.dtype | None) -> None:
    if is_quantized(model.causal):
        raise UnsupportedError("an adapter cannot be added to quantized weights without loss: pass merged=False")
    whole = _copy_on_cpu(model.model)
    if model.is_lora:
        _untie(whole)
        whole = _merged(whole, dtype)
    if dtype is not None:
        whole.to(dtype)
        whole.config.dtype = dtype
    whole.config._attn_implementation_internal = None  # the one that packs is this library's own
    whole.save_pretrained(folder)


@torch.no_grad()
def _merged(whole: Any, dtype: torch.dtype | None) -> Any:
    """Add the adapter to each layer in fp32 at least, and round the sum once; say how much of the change that costs."""
    change, lost = 0.0, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied weights, which are seen to, and of layers merged already
        for layer in [module for module in whole.modules() if hasattr(module, "get_base_layer")]:
            weights = dict(layer.get_base_layer().named_parameters(recurse=False))
            before = {name: p.data for name, p in weights.items()}
            for p in weights.values():
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
            layer.merge(safe_merge=True)
            for name, p in layer.get_base_layer().named_parameters(recurse=False):
                exact, p.data = p.data, p.data.to(dtype or before[name].dtype)
                change += float((exact - before[name]).double().square().sum())
                lost += float((exact - p.data).double().square().sum())
        whole = whole.merge_and_unload()
    if lost:
        share = (lost / max(change, lost * 1e-12)) ** 0.5
        _logger.warning(
            "merged weights are rounded to %s: the error is %.2g of the adapter's change, by their norms; export with "
            "dtype='float32', or merged=False, keeps it",
            str(dtype or whole.dtype).removeprefix("torch."),
            share,
        )
    return whole


def _untie(model: Any) -> None:
    """Give the head weights of its own, where an adapter or a copy on it must not reach the embedding, or the reverse."""
    causal = model.get_base_model()
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    wrapped = [hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in (head, embedding)]
    config = causal.config.get_text_config()
    if not getattr(config, "tie_word_embeddings", False) or not any(wrapped):
        return
    base = getattr(head, "base_layer", getattr(head, "original_module", head))
    base.weight = nn.Parameter(base.weight.detach().clone())
    for one in {id(c): c for c in (config, causal.config)}.values():
        one.tie_word_embeddings = False


def _copy_on_cpu(model: nn.Module) -> Any:
    """Return a copy in main memory; tensors that were shared are shared there."""
    memo: dict[int, Tensor] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().cpu().clone(), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = b.detach().cpu().clone()
    return copy.deepcopy(model, memo)
