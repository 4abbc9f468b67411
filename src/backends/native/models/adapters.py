"""What an adapter leaves of its base, and whether a saved one is the same function (peft models)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

from ....errors import MissingReferenceError

__all__ = ["adapter_differences", "require_frozen_base"]

_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq")
_WRAPPERS: Final = ("modules_to_save", "trainable_tokens_")  # peft keeps the original beside what is trained
_FUNCTION: Final = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "lora_bias",
    "bias",
    "fan_in_fan_out",
    "layer_replication",
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
    outside = list(_trained_outside(model))
    if outside:
        raise MissingReferenceError(
            f"weights of the base are trained beside the adapter ({', '.join(outside[:3])}{', ...' if outside[3:] else ''}): "
            "with the adapter off they are no frozen reference; pass reference=<a frozen copy> to TorchBackend"
        )


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
    return [
        f"{name} is {saved.get(name)!r}, here {_plain(current.get(name))!r}"
        for name in (*_FUNCTION, "init_lora_weights")
        if name in saved and saved[name] != _plain(current.get(name)) and not _same_start(name, saved, current)
    ]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _same_start(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether two starts leave the base as it is; then the weights that are loaded replace them."""
    starts = (str(one.get(name, "")).lower() for one in (saved, current))
    return name == "init_lora_weights" and not any(start.startswith(_CHANGES_BASE) for start in starts)
