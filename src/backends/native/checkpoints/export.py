"""Getting a trained model out, as a folder that transformers or peft loads (extra ``hf``)."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ....errors import CheckpointError, ConfigError, UnsupportedError
from ..models.facts.quantized import is_quantized
from ..models.hf import HFModel
from .checkpoint import ADAPTER
from .files import unfinished, write_tensors

__all__ = ["Export"]

_HOOKS: Final = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Export:
    """A model that is to be written as a folder of weights, config and tokenizer.

    Attributes:
        model: as the backend has it, perhaps sharded; it is not changed.
        tokenizer: None is left out.
        folder: where to.
        merged: a LoRA adapter is added to the weights below it; else it is written alone, in PEFT's format.
        overwrite: replace what is there.
        dtype: of whole weights; None: as they are.
    """

    model: nn.Module
    tokenizer: Any
    folder: Path
    merged: bool
    overwrite: bool
    dtype: torch.dtype | None = None

    def check(self) -> None:
        """Check that it can be written, before any work.

        Raises:
            CheckpointError: the folder exists.
            ConfigError: a dtype for an adapter alone.
            UnsupportedError: not a model of transformers, or one whose adapter cannot be written so.
        """
        model = self._hf
        outside = sorted(model.trained_outside()) if self._alone else []
        if self._alone and self.dtype is not None:
            raise ConfigError(f"dtype={self.dtype} is of merged weights; an adapter alone is written as it is")
        if self.folder.exists() and not self.overwrite:
            raise CheckpointError(f"{self.folder} exists; choose another folder or pass overwrite=True")
        if outside:
            raise UnsupportedError(
                f"weights are trained beside the adapter, so it is not all: pass merged=True: {outside[:5]}"
            )
        if not self._alone and is_quantized(model.causal):
            raise UnsupportedError("an adapter cannot be added to quantized weights without loss: pass merged=False")

    def weights(self) -> dict[str, Tensor]:
        """Return the live tensors that are written, by name."""
        model = self._hf
        return model.adapter_weights() if self._alone else dict(model.model.named_parameters())

    def write(self, weights: dict[str, Tensor]) -> str:
        """Write the folder, atomically; return it.

        Args:
            weights: what `weights` names, whole; each is dropped when it has been copied.
        """
        with unfinished(self.folder) as path:
            if self._alone:
                write_tensors(weights, path / ADAPTER)
                self._hf.write_adapter_config(path)
            else:
                _write_whole(_copy_on_cpu(self._hf.model, weights), path, self.dtype, merge=self._hf.is_lora)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(path)
        return str(self.folder)

    @property
    def described(self) -> str:
        """What must be the same on every process."""
        return f"{self.folder} merged={self.merged}, overwrite={self.overwrite}, dtype={self.dtype}"

    @property
    def _hf(self) -> HFModel:
        if not isinstance(self.model, HFModel):
            kind = type(self.model).__name__.removeprefix("FSDP")
            raise UnsupportedError(f"export writes models of transformers (HFModel), not {kind}: use save_weights")
        return self.model

    @property
    def _alone(self) -> bool:
        return self._hf.is_lora and not self.merged


def _write_whole(whole: Any, folder: Path, dtype: torch.dtype | None, merge: bool) -> None:
    if merge:
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


def _copy_on_cpu(model: nn.Module, weights: dict[str, Tensor]) -> Any:
    """Return a copy in main memory with these weights; tensors that were shared are shared there, and nothing is sharded."""
    memo: dict[int, Any] = {}
    for name, p in model.named_parameters():
        memo[id(p)] = nn.Parameter(weights.pop(name).detach().to("cpu", copy=True), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = b.detach().cpu().clone()
    units = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        # FSDP makes a class of its own, which cannot be copied, of itself and the layer's.
        plain = type(unit).__bases__[1]
        memo[id(unit)] = object.__new__(plain)
    for unit in units:
        memo[id(unit)].__dict__ |= copy.deepcopy(_without_hooks(unit), memo)
    return copy.deepcopy(model, memo)


def _without_hooks(unit: nn.Module) -> dict[str, Any]:
    """Return the attributes of a layer that FSDP shards, without what FSDP has added to them."""
    kept = {name: value for name, value in vars(unit).items() if not name.startswith("__composable")}
    return {name: type(value)() if name.endswith(_HOOKS) else value for name, value in kept.items()}
