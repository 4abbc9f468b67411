"""What a loss class must declare before it has a name in a registry."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from ..errors import ConfigError, suggestion
from .base import GradientKind, Loss
from .batch.keys import INPUT_KEYS
from .checks import choice

__all__ = ["require_declaration"]


def require_declaration(loss: Any) -> None:
    """Check that a class is a loss that can be made, and that it declares what backends rely on.

    A declaration that is a property is left to the first use.

    Raises:
        ConfigError: it is no class of losses, lacks a part, or declares a gradient kind or an input that does not exist.
    """
    if not (isinstance(loss, type) and issubclass(loss, Loss)):
        raise ConfigError(
            f"a registry takes classes of Loss, got {loss!r}; a function goes to forward_backward_custom as it is"
        )
    missing = sorted(getattr(loss, "__abstractmethods__", ()))
    missing += [name for name in ("name", "aggregation") if not hasattr(loss, name)]
    if missing:
        raise ConfigError(f"the loss class {loss.__name__} lacks {', '.join(missing)}")
    if isinstance(loss.gradient_kind, str):
        choice(f"gradient_kind of {loss.name}", loss.gradient_kind, get_args(GradientKind))
    for which in ("required_inputs", "optional_inputs"):
        declared: Any = inspect.getattr_static(loss, which)
        for key in declared if isinstance(declared, tuple | list) else ():
            _require_key(f"{which} of {loss.name}", key)


def _require_key(place: str, key: Any) -> None:
    if key in INPUT_KEYS:
        return
    meant = " (did you mean 'logprobs'?)" if key == "rollout_logprobs" else suggestion(str(key), INPUT_KEYS)
    raise ConfigError(
        f"{place} has {key!r}{meant}; the keys of a datum that a Loss can read are {', '.join(INPUT_KEYS)}"
    )
