"""Adapters on the dense layers of a mixture of experts, which peft drops where they are named as its experts once were."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from .facts.quantized import is_quantized
from .layers import layer_ends, linear_layers

__all__ = ["keep_dense_layers"]


def keep_dense_layers(config: Any, model: Any) -> Any:
    """Return a LoRA config that is on all the linear layers that it names, if peft would drop some.

    transformers keeps the experts of a layer in one tensor, where ``gate_proj`` and its like were layers before. peft takes
    these names for the experts alone, and then leaves out the dense layers, and the shared experts, that still have them.
    They are named by their weights instead; quantised ones cannot be.

    Args:
        config: a ``peft.LoraConfig``; it is not changed.
        model: of transformers, without an adapter.
    """
    converted = _converted(config, model)
    named = config.target_modules
    if converted.target_modules == named or named is None or is_quantized(model):
        return config
    wanted = [path for path, _ in linear_layers(model) if named == "all-linear" or _is_named(path, named)]
    head = model.get_output_embeddings()
    dropped = [p for p in wanted if not _is_named(p, converted.target_modules) and model.get_submodule(p) is not head]
    if not dropped:
        return config
    weights = {f"{end}.weight" for end in layer_ends(dropped, dict(linear_layers(model)))}
    converted.target_parameters = {*(converted.target_parameters or ()), *weights}
    return converted


def _converted(config: Any, model: nn.Module) -> Any:
    """Return what peft makes of a config for this model."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # of another version
        return config
    converted = copy.deepcopy(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert_peft_config_for_transformers(converted, model, None)
    return converted


def _is_named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)
