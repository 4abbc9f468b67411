"""What a budget needs to know of a model, read from the model; it may be one without memory, on the ``meta`` device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from .....errors import CheckpointError, ConfigError, UnsupportedError, require_extra
from ...execution.graph_size import GraphShape
from ...models.load import torch_dtype
from ...models.lora import add_lora
from ..sharding import sharded_units

__all__ = ["graph_shape", "model_outline", "read_config"]

_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_MATRICES: Final = {*_ATTENTION, "gate_proj", "up_proj", "down_proj"}
_NORMS: Final = {"input_layernorm", "post_attention_layernorm"}


def read_config(path: str | Path) -> Any:
    """Return the config of a transformers model from its folder, its name on the hub, or a JSON file.

    Raises:
        CheckpointError: there is none.
        ConfigError: the file is no config, or of a kind that transformers does not know.
    """
    transformers = require_extra("transformers", "hf", "a model's config")
    try:
        if not Path(path).is_file():
            return transformers.AutoConfig.from_pretrained(str(path))
        fields = json.loads(Path(path).read_text())
        return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    except OSError as error:
        raise CheckpointError(f"{path} holds no config that transformers can read: {_first_line(error)}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} is no config of transformers, a JSON object with the key model_type: {_first_line(error)}"
        ) from error


def model_outline(config: Any, *, dtype: str | torch.dtype = "float32", lora: Any = None) -> nn.Module:
    """Return the model of a config without memory for its weights.

    Args:
        config: of transformers.
        dtype: of the weights; adapters are fp32.
        lora: as for `TorchBackend.from_pretrained`; None trains every parameter.

    Raises:
        UnsupportedError: no causal language model, or a quantised one.
    """
    transformers = require_extra("transformers", "hf", "the outline of a model")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError("quantised weights are smaller than their shapes say; a budget of them is not known")
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype))
    except ValueError as error:
        raise UnsupportedError(
            f"transformers has no causal language model of this config: {_first_line(error)}"
        ) from error
    return model if lora is None else add_lora(model, lora)


def graph_shape(module: nn.Module, config: Any, *, checkpointed: bool) -> GraphShape:
    """Return the shape of a Llama-shaped model's layers.

    Args:
        module: of transformers, perhaps with an adapter.
        config: its config.
        checkpointed: layers run again in the backward.

    Raises:
        UnsupportedError: its layers have other parts, or part of them is frozen.
    """
    layers = sharded_units(module)
    if not layers or not all(_is_llama(layer) for layer in layers):
        raise UnsupportedError(
            f"what autograd retains is known for Llama-shaped layers ({', '.join(sorted(_MATRICES | _NORMS))}), and this "
            f"{type(module).__name__} has others; measure a step (metric graph_bytes:max, divided by its tokens), and give "
            "that as bytes per token"
        )
    adapters = _adapters(layers[0])
    if not adapters and not all(p.requires_grad for p in module.parameters()):
        raise UnsupportedError(
            "part of the weights is frozen, without an adapter; give a measured number of bytes per token"
        )
    sizes = {name: _matrix(layers[0], name) for name in ("q_proj", "k_proj", "gate_proj")}
    heads = int(config.num_attention_heads)
    return GraphShape(
        layers=len(layers),
        hidden=sizes["q_proj"].shape[1],
        intermediate=sizes["gate_proj"].shape[0],
        heads=heads,
        queries=sizes["q_proj"].shape[0],
        keys=sizes["k_proj"].shape[0],
        head_width=sizes["q_proj"].shape[0] // heads,
        bytes_each=sizes["q_proj"].element_size(),
        adapters=adapters,
        checkpointed=checkpointed,
    )


def _is_llama(layer: nn.Module) -> bool:
    """Whether a layer has the parts that `GraphShape` counts, and no other with weights."""
    plain = [name.removesuffix(".base_layer") for name, part in layer.named_modules() if _own_weights(name, part)]
    return sorted(name.rsplit(".", 1)[-1] for name in plain) == sorted(_MATRICES | _NORMS)


def _own_weights(name: str, part: nn.Module) -> bool:
    return "lora_" not in name and any(True for _ in part.parameters(recurse=False))


def _adapters(layer: nn.Module) -> Mapping[str, int]:
    """Return the rank of each matrix's adapter in a layer."""
    return {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]: p.shape[0]
        for name, p in layer.named_parameters()
        if ".lora_A." in name
    }


def _matrix(layer: nn.Module, name: str) -> nn.Parameter:
    return next(
        p for key, p in layer.named_parameters() if key.endswith((f"{name}.weight", f"{name}.base_layer.weight"))
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
