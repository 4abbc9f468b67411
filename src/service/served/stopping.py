"""Where a completion ends: at tokens, or where its text holds a string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...backends import SamplingParams
from ...backends.native.sampling import Ends
from ...datums.types import ModelInput
from ...errors import ConfigError
from .registry import Base

__all__ = ["sampling_of"]

_KNOWN: Final = {"max_tokens", "temperature", "top_k", "top_p", "stop", "seed"}
_BYTES: Final = 4  # a character's most, and a token is at least one


def sampling_of(given: Mapping[str, Any], base: Base, prompt: ModelInput) -> tuple[SamplingParams, Ends | None]:
    """Read ``sampling_params``.

    ``stop`` absent: the model's own end-of-text tokens; token ids: these and no others; strings: the completion also ends
    with the token after which its text holds one of them. ``max_tokens`` absent: as far as the model's context goes.

    Raises:
        ConfigError: a key or value that is not known.
    """
    unknown = sorted(k for k, v in given.items() if k not in _KNOWN and v is not None)
    if unknown:
        raise ConfigError(f"sampling_params has keys that this server does not know: {unknown}")
    chosen = {k: v for k, v in given.items() if v is not None}
    if "max_tokens" not in chosen and base.context is not None:
        chosen["max_tokens"] = max(1, base.context - len(prompt))
    stop = chosen.pop("stop", None)
    strings = [stop] if isinstance(stop, str) else stop
    if strings is None or (isinstance(strings, list) and all(type(t) is int for t in strings)):
        return SamplingParams(**chosen, stop=strings), None
    if not isinstance(strings, list) or not all(isinstance(t, str) and t for t in strings):
        raise ConfigError(f"stop must be a string, a list of strings, or a list of token ids, got {stop!r}")
    return SamplingParams(**chosen), _holds(strings, base)


def _holds(strings: Sequence[str], base: Base) -> Ends:
    tokenizer, reach = base.tokenizer(), _BYTES * max(map(len, strings))

    def ends(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(list(tokens[-reach:]), skip_special_tokens=False)
        return any(string in text for string in strings)

    return ends
