"""LoRA adapters (extra ``hf``): what of a model gets one, how large, and on what scale. The one place of their defaults."""

from __future__ import annotations

import json
import logging
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self, final

from torch import nn

from ....errors import CheckpointError, ConfigError, require_extra
from .adapters import active_adapter, adapter_differences
from .dense_layers import keep_dense_layers
from .layers import LLAMA, LayerNames, coverage, layer_names

__all__ = ["ATTENTION", "MLP", "UNEMBED", "LoraChoice", "add_lora", "checkpoint_alpha", "saved_config", "set_alpha"]

_logger = logging.getLogger(__name__)
ATTENTION: Final = LLAMA.attention
MLP: Final = LLAMA.mlp
UNEMBED: Final = LLAMA.unembed
_ALPHAS: Final = (1e-6, 1e6)  # beyond them, an fp32 output would be the base's alone, or the adapter's
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
            raise ConfigError(
                f"the rank of an adapter must be a whole number of at least 1, got {reprlib.repr(self.rank)}"
            )

    def checked(self) -> Self:
        """Return the choice if a user may make it; what a checkpoint or a journal says is taken as it is.

        Raises:
            ConfigError: a field is of another type, or out of range.
        """
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**64:
            raise ConfigError(
                f"the seed of an adapter must be a whole number of 64 bits, got {reprlib.repr(self.seed)}"
            )
        low, high = _ALPHAS
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not low <= self.alpha <= high:
            raise ConfigError(
                f"the alpha of an adapter must be a number from {low:g} to {high:g}, got {reprlib.repr(self.alpha)}"
            )
        for name in ("train_attn", "train_mlp", "train_unembed", "base_only"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} of an adapter must be true or false, got {reprlib.repr(getattr(self, name))}"
                )
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> LoraChoice:
        """Read the entry of a journal; an alpha of null, as earlier versions wrote it, means the rank."""
        given = json.loads(text)
        return cls(**given | ({"alpha": given["rank"]} if given.get("alpha") is None else {}))

    def layers(self, names: LayerNames = LLAMA) -> list[str] | str:
        """Return the names of the layers to adapt, or peft's word for all linear layers but the head.

        Args:
            names: of the model's layers.

        Raises:
            ConfigError: there are none.
        """
        chosen = (self.train_attn, self.train_mlp, self.train_unembed)
        if chosen == (True, True, False) and names[:2] == LLAMA[:2]:
            return "all-linear"
        found = [name for part, on in zip(names, chosen, strict=True) if on for name in part]
        if not found:
            raise ConfigError("the adapter trains nothing: set train_attn, train_mlp or train_unembed")
        return found

    def as_saved(self, config: Any, names: LayerNames = LLAMA) -> LoraChoice:
        """Return the choice that a checkpoint's adapter was made by; layers of unknown names say nothing."""
        named = (*config.target_modules, *(config.target_parameters or ()))
        adapted = [f".{name.removesuffix('.weight')}" for name in named]
        found = [any(_meet(f".{name}", one) for name in part for one in adapted) for part in names]
        parts = dict(zip(("train_attn", "train_mlp", "train_unembed"), found, strict=True))
        return replace(self, rank=config.r, alpha=config.lora_alpha, **(parts if any(found) else {}))


def _meet(a: str, b: str) -> bool:
    return a.endswith(b) or b.endswith(a)


def add_lora(model: nn.Module, lora: Any, layers: Sequence[str] | str | None = None) -> nn.Module:
    """Wrap a transformers model with LoRA; what it is on, and what not, is logged.

    Args:
        model: of transformers; it is changed.
        lora: a rank, all else being as `LoraChoice` has it; a `LoraChoice`; a ``peft.LoraConfig``, or a dict of its
            fields, those left out being as `LoraChoice` has them; or the folder of a checkpoint, whose adapter's settings
            are used (its weights are not loaded).
        layers: what is adapted where ``lora`` does not say; default: all linear layers of attention and feed-forward that
            a text runs through.

    Raises:
        ConfigError: the rank is no whole number of at least 1, a field is not known, or no layer has such a name.
        CheckpointError: the folder has no adapter.
    """
    peft = require_extra("peft", "hf", "lora=")
    own = not isinstance(lora, peft.PeftConfig)
    open_alpha = isinstance(lora, int) or (isinstance(lora, Mapping) and "lora_alpha" not in lora)
    with quiet_peft():
        if own:
            # An adapter on the output projection is on it alone; the embedding stays the base's.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        try:
            adapted: nn.Module = peft.get_peft_model(model, _config(peft, model, lora, layers) if own else lora)
        except (ValueError, TypeError) as error:  # the latter of weights of a quantisation that peft does not know
            raise ConfigError(f"lora={lora!r} does not fit {type(model).__name__}: {error}") from error
    setattr(adapted, _OPEN_ALPHA, open_alpha)
    _logger.info("%s", coverage(adapted))
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Ignore what peft warns of and a caller could not change."""
    with warnings.catch_warnings():
        # peft asks for a name that transformers 5 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # peft sets it by the kind of layer
        # and lets an adapter of all linear layers be on fused experts, by patterns that it then does not find
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys .*gate_up_proj", RuntimeWarning)
        yield


def _config(peft: Any, model: Any, lora: Any, layers: Sequence[str] | str | None) -> Any:
    """Return peft's config of what is given in another form."""
    if isinstance(lora, (str, Path)):
        return saved_config(Path(lora))
    fields = dict(lora) if isinstance(lora, Mapping) else {}
    choice = lora if isinstance(lora, LoraChoice) else LoraChoice(fields.get("r", LoraChoice.rank) if fields else lora)
    settings = {"r": choice.rank, "lora_alpha": choice.alpha, "task_type": "CAUSAL_LM", "ensure_weight_tying": False}
    if "target_modules" not in fields:
        settings["target_modules"] = layers or choice.layers(layer_names(model))
    try:
        config = peft.LoraConfig(**{**settings, **fields})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora={lora!r} is no set of fields of peft.LoraConfig: {error}") from error
    return config if "target_modules" in fields else keep_dense_layers(config, model)


def saved_config(folder: Path) -> Any:
    """Return the settings of a checkpoint's adapter, as a ``peft.LoraConfig``.

    Raises:
        CheckpointError: the folder has none, or a damaged one.
    """
    peft = require_extra("peft", "hf", "the adapter of a checkpoint")
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder} lacks {_CONFIG}: it is no checkpoint of an adapter")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / _CONFIG} is damaged: {error}") from error
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
