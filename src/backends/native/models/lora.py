"""LoRA adapters (extra ``hf``): what of a model gets one, how large, and on what scale. The one place of their defaults."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from torch import nn

from ....errors import CheckpointError, ConfigError, require_extra
from .adapters import active_adapter, adapter_differences

__all__ = ["ATTENTION", "MLP", "UNEMBED", "LoraChoice", "add_lora", "checkpoint_alpha", "saved_config", "set_alpha"]

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: Final = ("gate_proj", "up_proj", "down_proj")
UNEMBED: Final = ("lm_head",)
_CONFIG: Final = "adapter_config.json"
_OPEN_ALPHA: Final = "alpha_is_default"  # on a model whose adapter's alpha nobody asked for


@final
@dataclass(frozen=True)
class LoraChoice:
    """What of a model gets an adapter. The defaults hold wherever nobody says otherwise.

    Args:
        rank: of the adapters.
        seed: of their start.
        alpha: their scale is ``alpha / rank``.
        train_attn, train_mlp, train_unembed: attention, feed-forward, output projection.
        base_only: the model is the frozen base and only scores; its adapter stays at nothing.
    """

    rank: int = 32
    seed: int = 0
    alpha: float = 32
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False
    base_only: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"the rank of an adapter must be a whole number of at least 1, got {self.rank!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> LoraChoice:
        """Read the entry of a journal; an alpha of null, as earlier versions wrote it, means the rank."""
        given = json.loads(text)
        return cls(**given | ({"alpha": given["rank"]} if given.get("alpha") is None else {}))

    def layers(
        self, attention: Sequence[str] = ATTENTION, mlp: Sequence[str] = MLP, unembed: Sequence[str] = UNEMBED
    ) -> list[str] | str:
        """Return the names of the layers to adapt, or peft's word for all linear layers but the head.

        Raises:
            ConfigError: there are none.
        """
        chosen = (self.train_attn, self.train_mlp, self.train_unembed)
        if chosen == (True, True, False) and (attention, mlp) == (ATTENTION, MLP):
            return "all-linear"
        found = [name for names, on in zip((attention, mlp, unembed), chosen, strict=True) if on for name in names]
        if not found:
            raise ConfigError("the adapter trains nothing: set train_attn, train_mlp or train_unembed")
        return found

    def as_saved(
        self,
        config: Any,
        attention: Sequence[str] = ATTENTION,
        mlp: Sequence[str] = MLP,
        unembed: Sequence[str] = UNEMBED,
    ) -> LoraChoice:
        """Return the choice that a checkpoint's adapter was made by; layers of unknown names say nothing."""
        adapted = {name.rpartition(".")[2] for name in config.target_modules}
        parts = {"train_attn": attention, "train_mlp": mlp, "train_unembed": unembed}
        found = {part: not adapted.isdisjoint(names) for part, names in parts.items()}
        return replace(self, rank=config.r, alpha=config.lora_alpha, **(found if any(found.values()) else {}))


def add_lora(model: nn.Module, lora: Any, layers: Sequence[str] | str | None = None) -> nn.Module:
    """Wrap a transformers model with LoRA.

    Args:
        model: of transformers; it is changed.
        lora: a rank, all else being as `LoraChoice` has it; a `LoraChoice`; a ``peft.LoraConfig``; or the folder of a
            checkpoint, whose adapter's settings are used (its weights are not loaded).
        layers: what a `LoraChoice` adapts; default: its own ``layers()``.

    Raises:
        ConfigError: the rank is no whole number of at least 1.
        CheckpointError: the folder has no adapter.
    """
    peft = require_extra("peft", "hf", "lora=")
    by_rank, own = isinstance(lora, int), not isinstance(lora, peft.PeftConfig)
    if by_rank:
        lora = LoraChoice(lora)
    if isinstance(lora, (str, Path)):
        lora = saved_config(Path(lora))
    if isinstance(lora, LoraChoice):
        settings = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": layers or lora.layers()}
        lora = peft.LoraConfig(**settings, task_type="CAUSAL_LM", ensure_weight_tying=False)
    with warnings.catch_warnings():
        # peft asks for a name that transformers 5 deprecates; nothing the caller could change
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if own:
            # An adapter on the output projection is on it alone; the embedding stays the base's.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        adapted: nn.Module = peft.get_peft_model(model, lora)
    setattr(adapted, _OPEN_ALPHA, by_rank)
    return adapted


def saved_config(folder: Path) -> Any:
    """Return the settings of a checkpoint's adapter, as a ``peft.LoraConfig``.

    Raises:
        CheckpointError: the folder has none.
    """
    peft = require_extra("peft", "hf", "the adapter of a checkpoint")
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder} lacks {_CONFIG}: it is no checkpoint of an adapter")
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = False, None  # the base may have moved since
    return config


def checkpoint_alpha(model: Any, folder: Path) -> float | None:
    """Return the alpha that a model must take over with a checkpoint's weights; None: it has it, or has no such thing.

    Raises:
        CheckpointError: the model's adapter is another function of the same weights.
    """
    saved, own = saved_config(folder).to_dict(), model.peft_config[active_adapter(model)].to_dict()
    theirs, ours = saved.get("lora_alpha"), own.get("lora_alpha")
    taken_over = theirs is not None and getattr(model, _OPEN_ALPHA, False)
    for name, spoken in (("r", "rank"), ("lora_alpha", "alpha")):
        if saved.get(name) != own.get(name) and not (name == "lora_alpha" and taken_over):
            raise _another(folder, f"{spoken} {saved.get(name)}, and this model was made with {spoken} {own.get(name)}")
    differing = adapter_differences(saved, own | ({"lora_alpha": theirs} if taken_over else {}))
    if differing:
        raise _another(folder, f"other settings than this model's: {'; '.join(differing)}")
    return None if theirs == ours else theirs


def _another(folder: Path, difference: str) -> CheckpointError:
    advice = "make it with lora=<that folder>, which takes the checkpoint's settings"
    return CheckpointError(f"the adapter of {folder} has {difference}: {advice}")


def set_alpha(model: Any, alpha: float) -> None:
    """Give all layers of a model's adapter another alpha."""
    name = active_adapter(model)
    model.peft_config[name].lora_alpha = alpha
    for module in model.modules():
        if hasattr(module, "lora_alpha") and name in module.lora_alpha:
            module.lora_alpha[name] = alpha
            module.scaling[name] = alpha / module.r[name]
