"""What a model's config says of lengths: windows, chunks, contexts, and what differs for short and long texts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

__all__ = ["ModelFacts", "attention_width", "read_facts", "text_config"]

_WINDOWS: Final = ("sliding_window", "attention_window_size", "window_size", "local_attention")
_CHUNK: Final = "attention_chunk_size"
_CONTEXTS: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
_FULL: Final = frozenset(("full_attention", "linear_attention", "mamba", "conv", "recurrent"))


@final
@dataclass(frozen=True)
class ModelFacts:
    """What depends on the length of a text, tokens; None where nothing does.

    Attributes:
        window: of the layers that see only the tokens just before.
        chunk: of the layers that see only their own chunk.
        longrope: a text longer than this has other rotary frequencies, from its first token on.
        dynamic_rope: beyond this every length has its own.
        max_length: longest text that the model was made for.
        dropouts: names of the probabilities in the config that are not zero.
    """

    window: int | None = None
    chunk: int | None = None
    longrope: int | None = None
    dynamic_rope: int | None = None
    max_length: int | None = None
    dropouts: tuple[str, ...] = ()

    @property
    def thresholds(self) -> tuple[int, ...]:
        """Lengths beyond which the model may behave differently, ascending."""
        named = (self.window, self.chunk, self.longrope, self.dynamic_rope)
        return tuple(sorted({n for n in named if n is not None and n < (self.max_length or n + 1)}))

    @property
    def reasons(self) -> tuple[str, ...]:
        """The thresholds in words."""
        named = {
            "attention sees a window of {} tokens in some layers": self.window,
            "attention sees chunks of {} tokens in some layers": self.chunk,
            "texts of more than {} tokens have other rotary frequencies (longrope)": self.longrope,
            "rotary frequencies depend on the length beyond {} tokens (dynamic NTK)": self.dynamic_rope,
            "the context is {} tokens": self.max_length,
        }
        return tuple(template.format(length) for template, length in named.items() if length is not None)


def text_config(config: Any) -> Any:
    """Return the part of a config that describes the language model."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def read_facts(config: Any) -> ModelFacts:
    """Return what a transformers config says; a field that it lacks is not read."""
    config = text_config(config)
    original = _original_context(config)
    context = _first_length(config, _CONTEXTS)
    dynamic = context if any("dynamic" in kind for kind, _ in _ropes(config)) else None
    return ModelFacts(
        window=_window(config),
        chunk=_length(config, _CHUNK),
        longrope=original,
        dynamic_rope=dynamic,
        max_length=context if dynamic is None else _scaled(config, dynamic),
        dropouts=tuple(_dropouts(config)),
    )


def attention_width(config: Any) -> float:
    """Return the width of all attention heads, summed over layers, 0 where the config does not say.

    Two products of this width are made for each pair of tokens.
    """
    config = text_config(config)
    heads, layers = _length(config, "num_attention_heads") or 0, _length(config, "num_hidden_layers") or 0
    if not heads:
        return 0.0
    width = _length(config, "head_dim") or (_length(config, "hidden_size") or 0) // heads
    return float(heads * width * layers)


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a config may refuse a field that differs by layer, each in its own way
        return None


def _length(config: Any, name: str) -> int | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old spelling still says what is asked
        found = _get(config, name)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def _first_length(config: Any, names: tuple[str, ...]) -> int | None:
    return next((n for n in (_length(config, name) for name in names) if n is not None), None)


def _window(config: Any) -> int | None:
    """The window, where a layer has one."""
    if _get(config, "use_sliding_window") is False:
        return None
    kinds = _get(config, "layer_types")
    if kinds and all(kind in _FULL for kind in kinds):
        return None
    return _first_length(config, _WINDOWS)


def _ropes(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield kind and parameters of every rotary embedding; a config may have one for each type of layer."""
    given = _get(config, "rope_parameters") or _get(config, "rope_scaling")
    if not isinstance(given, Mapping):
        return
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    for one in nested or [given]:
        yield str(one.get("rope_type") or one.get("type") or "default"), one


def _original_context(config: Any) -> int | None:
    lengths = [
        one.get("original_max_position_embeddings") or _length(config, "original_max_position_embeddings")
        for kind, one in _ropes(config)
        if kind == "longrope"
    ]
    return min((int(n) for n in lengths if n), default=None)


def _scaled(config: Any, context: int) -> int:
    factors = [float(one.get("factor") or 1.0) for kind, one in _ropes(config) if "dynamic" in kind]
    return int(context * max(factors, default=1.0))


def _dropouts(config: Any) -> Iterator[str]:
    for name in sorted(getattr(config, "to_dict", dict)()):
        value = _get(config, name)
        named = "dropout" in name or name.endswith(("pdrop", "_drop")) or name == "layerdrop"
        if named and isinstance(value, float) and value > 0 and not name.startswith("classifier"):
            yield name
