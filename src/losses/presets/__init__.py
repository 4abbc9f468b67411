"""Presets: the losses that other projects compute, by their names and with their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final, TypeVar

from ...errors import ConfigError, suggestion
from ..base import Loss
from . import skyrl, tinker, trl, verl

__all__ = ["looked_up", "preset", "preset_names"]
Built = TypeVar("Built")

_PRESETS: Final[dict[str, Callable[..., Loss]]] = {**tinker.PRESETS, **trl.PRESETS, **verl.PRESETS, **skyrl.PRESETS}


def preset(name: str, **overrides: Any) -> Loss:
    """Return the loss that another project computes under a name, e.g. ``preset("trl:dapo", beta=0.04)``.

    ``overrides`` carry that project's own spelling. ``seed:grpo`` has its KL as k1 in the loss, whose expected gradient is
    zero; it reproduces a published example exactly and is not advice.

    Raises:
        ConfigError: no preset has that name, or it has no such option.
    """
    build = looked_up("preset", name, _PRESETS)
    options = inspect.signature(build).parameters
    for key in overrides:
        if key not in options:
            known = ", ".join(options) or "none"
            raise ConfigError(f"preset {name!r} has no option {key!r}{suggestion(key, options)}; it has: {known}")
    return build(**overrides)


def preset_names() -> tuple[str, ...]:
    """The names of all presets, sorted."""
    return tuple(sorted(_PRESETS))


def looked_up(kind: str, name: str, table: dict[str, Callable[..., Built]]) -> Callable[..., Built]:
    """Return the entry of a table.

    Raises:
        ConfigError: it has none of that name; the message lists those that it has.
    """
    if name not in table:
        raise ConfigError(f"unknown {kind} {name!r}{suggestion(name, table)}; known: {', '.join(sorted(table))}")
    return table[name]
