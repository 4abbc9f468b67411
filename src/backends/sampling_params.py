"""How to sample: the parameters of a call, checked when they are made."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Final, final

from ..errors import ConfigError
from ..losses.batch.adapt import as_tensor

__all__ = ["SamplingParams"]

_SEED_STRIDE: Final = 0x9E3779B1  # far from any difference that a user's seeds have


@final
@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Args:
        max_tokens: longest completion, tokens.
        temperature: 0 = greedy.
        top_k: keep the k most probable tokens; -1 = all.
        top_p: keep the smallest set of tokens with this mass; 1.0 = all.
        stop: token ids that end a completion (they are part of it); None = the model's own end-of-text tokens.
        seed: makes the samples repeatable, whatever other prompts are drawn with them; None = the backend's running
            generator.

    Raises:
        ConfigError: a field is of another type, or out of range; strings to stop at are no token ids.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop: Sequence[int] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", *(() if self.seed is None else ("seed",))):
            _require(name, getattr(self, name), Integral, "a whole number")
        for name in ("temperature", "top_p"):
            _require(name, getattr(self, name), Real, "a number")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k != -1 and self.top_k < 1:
            raise ConfigError(f"top_k must be positive, or -1 for all, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.stop is not None:
            object.__setattr__(self, "stop", _token_ids(self.stop))

    def for_prompt(self, index: int) -> SamplingParams:
        """Return how to draw one prompt of a call alone: the first one by the seed itself, each other by its own."""
        if self.seed is None:
            return self
        return replace(self, seed=(self.seed + index * _SEED_STRIDE) % 2**31)


def _require(name: str, value: object, kind: type, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ConfigError(f"{name} must be {words}, got {reprlib.repr(value)}")


def _token_ids(stop: Any) -> tuple[int, ...]:
    """Return the tokens to stop at as plain numbers; a string, or an id in a tensor, would equal no token that is drawn."""
    if isinstance(stop, (str, bytes)) or (
        isinstance(stop, Sequence) and any(isinstance(t, (str, bytes)) for t in stop)
    ):
        raise ConfigError(
            f"stop must be token ids, got {reprlib.repr(stop)}: a backend knows no text; encode it, e.g. "
            "stop=tokenizer.encode(text, add_special_tokens=False) where that is one token"
        )
    try:
        ids = as_tensor(stop if hasattr(stop, "__array__") else list(stop))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"stop must be a list of token ids, got {reprlib.repr(stop)}") from error
    whole = not (ids.is_floating_point() or ids.is_complex() or str(ids.dtype) == "torch.bool")
    if ids.dim() != 1 or (ids.numel() and (not whole or int(ids.min()) < 0)):
        raise ConfigError(
            f"stop must be a list of token ids, which are whole numbers of at least 0, got {reprlib.repr(stop)}"
        )
    return tuple(int(token) for token in ids.tolist())
