"""LoRA adapters (extra ``hf``): what of a model gets one, how large, and on what scale."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from torch import nn

from ....errors import ConfigError, require_extra

__all__ = ["ATTENTION", "MLP", "UNEMBED", "LoraChoice", "add_lora"]

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: Final = ("gate_proj", "up_proj", "down_proj")
UNEMBED: Final = ("lm_head",)


@final
@dataclass(frozen=True)
class LoraChoice:
    """What of the base gets an adapter.

    Args:
        rank: of the adapters.
        seed: of their start.
        alpha: their scale is ``alpha / rank``; None: the base's own.
        train_attn, train_mlp, train_unembed: attention, feed-forward, output projection.
        base_only: the model is the frozen base and only scores; its adapter stays at nothing.
    """

    rank: int
    seed: int = 0
    alpha: float | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    base_only: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"lora_config.rank must be a whole number of at least 1, got {self.rank!r}")

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> LoraChoice:
        """Read what the journal holds."""
        return cls(**json.loads(text))


def add_lora(model: nn.Module, lora: Any) -> nn.Module:
    """Wrap a transformers model with LoRA: a rank (all linear layers, alpha = 2 rank), or a ``peft.LoraConfig``."""
    peft = require_extra("peft", "hf", "lora=")
    if isinstance(lora, bool) or (isinstance(lora, int) and lora < 1):
        raise ConfigError(f"lora must be a rank of at least 1 or a peft config, got {lora!r}")
    if isinstance(lora, int):
        lora = peft.LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft asks for a name that transformers 5 deprecates; nothing the caller could change
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted: nn.Module = peft.get_peft_model(model, lora)
    return adapted
