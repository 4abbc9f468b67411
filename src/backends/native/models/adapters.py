"""What an adapter leaves of its base, and whether a saved one is the same function (peft models)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

from ....errors import MissingReferenceError, UnsupportedError

__all__ = ["active_adapter", "adapter_differences", "merged_layers", "require_frozen_base", "require_supported"]

_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq")
_WRAPPERS: Final = ("modules_to_save", "trainable_tokens_")  # peft keeps the original beside what is trained
# What a config says beside the function of its weights; which layers it is on is told by the names of the weights.
_NO_FUNCTION: Final = frozenset(
    (
        *("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"),
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "ensure_weight_tying", "runtime_config", "fan_in_fan_out"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "init_weights"),
    )
)
_START: Final = "init_lora_weights"


def active_adapter(model: Any) -> str:
    """Return the name of the adapter that is on.

    Raises:
        UnsupportedError: there are several, or none.
    """
    active = model.active_adapters if hasattr(model, "active_adapters") else [model.active_adapter]
    if len(active) != 1:
        raise UnsupportedError(f"one adapter of a model is trained and saved at a time; active are {list(active)}")
    return str(active[0])


def require_supported(model: Any) -> None:
    """Check that a model with its adapters is one function of the tokens.

    Raises:
        UnsupportedError: virtual tokens, or dropout.
    """
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise UnsupportedError("prompt-learning adapters add virtual tokens; use a LoRA-like adapter")
        dropouts = {key: value for key, value in config.to_dict().items() if key.endswith("dropout") and value}
        for key, value in dropouts.items():
            raise UnsupportedError(
                f"adapter {name!r} has {key}={value}, and dropout is off here, so that a policy and its reference are the same "
                f"function each time: set {key}=0"
            )


def require_frozen_base(model: Any) -> None:
    """Check that the base below an adapter is what it was before training: only then is it a reference.

    Raises:
        MissingReferenceError: the adapter's start changed the base weights, or some of them are trained.
    """
    for name, config in model.peft_config.items():
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if start.startswith(_CHANGES_BASE):
            raise MissingReferenceError(
                f"adapter {name!r} starts with init_lora_weights={start!r}, which changes the base weights: the model with "
                "the adapter off is not the base; pass reference=<a frozen copy of the base> to TorchBackend"
            )
    merged = next(merged_layers(model), None)
    if merged is not None:
        raise MissingReferenceError(
            f"the adapter is merged into the base ({merged}, ...), which is no frozen reference; call unmerge_adapter(), or "
            "pass reference=<a frozen copy of the base> to TorchBackend"
        )
    outside = list(_trained_outside(model))
    if outside:
        raise MissingReferenceError(
            f"weights of the base are trained beside the adapter ({', '.join(outside[:3])}{', ...' if outside[3:] else ''}): "
            "with the adapter off they are no frozen reference; pass reference=<a frozen copy> to TorchBackend"
        )


def merged_layers(model: nn.Module) -> Iterator[str]:
    """Yield the names of the layers to whose weights peft has added an adapter."""
    for name, part in model.named_modules():
        layer: Any = part
        if hasattr(part, "base_layer") and getattr(layer, "merged", False) is True:
            yield name


def _trained_outside(model: nn.Module) -> Iterator[str]:
    prefix = str(getattr(model.base_model, "prefix", "lora_"))
    for name, p in model.named_parameters():
        if p.requires_grad and prefix not in name and not any(one in name for one in _WRAPPERS):
            yield name


def adapter_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return what makes two adapter configs different functions of the same weights, in words.

    Args:
        saved: what ``adapter_config.json`` holds.
        current: ``to_dict()`` of the model's own config.
    """
    pairs = {n: (_plain(saved.get(n)), _plain(current.get(n))) for n in sorted({*saved, *current} - _NO_FUNCTION)}
    return [
        f"{name} is {theirs!r}, here {ours!r}"
        for name, (theirs, ours) in pairs.items()
        if theirs != ours and (theirs or ours) and not (name == _START and _same_start(theirs, ours))
    ]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _same_start(*starts: Any) -> bool:
    """Whether two starts leave the base as it is; then the weights that are loaded replace them."""
    return not any(str(start).lower().startswith(_CHANGES_BASE) for start in starts)
