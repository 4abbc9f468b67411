"""What a request for a new model asks for; what this server cannot give is refused, not left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...backends.native.models.lora import LoraChoice
from ...errors import ConfigError

__all__ = ["given_settings", "lora_choice"]

_LORA: Final = {"rank", "seed", "alpha", "train_attn", "train_mlp", "train_unembed", "init_method"}
_INIT: Final = "kaiming"  # A uniform, B zero


def lora_choice(body: Mapping[str, Any], base_model: str, max_rank: int) -> LoraChoice:
    """Read the adapter that ``create_model`` asks for.

    Args:
        body: of the request.
        base_model: that is served.
        max_rank: that is granted.

    Raises:
        ConfigError: another base model, or something that is not known here.
    """
    if body.get("base_model") != base_model:
        raise ConfigError(f"this server serves {base_model!r}, not {body.get('base_model')!r}")
    optimizer = (body.get("optimizer_config") or {}).get("type", "adamw")
    if optimizer != "adamw":
        raise ConfigError(f"optimizer_config.type is {optimizer!r}; this server has adamw")
    if body.get("projection_head_dim") is not None:
        raise ConfigError("projection_head_dim is not supported by this server: it trains the language model alone")
    if body.get("base_only"):
        return LoraChoice(rank=1, base_only=True)
    given = given_settings(body)
    unknown = sorted(set(given) - _LORA)
    if unknown:
        raise ConfigError(f"lora_config has keys that this server does not know: {unknown}")
    if given.pop("init_method", _INIT) != _INIT:
        raise ConfigError(f"lora_config.init_method must be {_INIT!r} on this server")
    if given.get("rank") == 0:
        raise ConfigError("lora_config.rank is 0, which asks for full tuning; this server trains adapters: give a rank")
    lora = LoraChoice(**given).checked()
    if lora.rank > max_rank:
        raise ConfigError(f"lora_config.rank is {lora.rank}; this server takes at most {max_rank}")
    return lora


def given_settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a client says of the adapter; null says nothing."""
    return {k: v for k, v in (body.get("lora_config") or {}).items() if v is not None}
