"""Losses of the user's own modules, which register them when they are imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

from ...errors import ConfigError
from ...losses import Loss, loss_names, registry
from .object_references import load_module

__all__ = ["import_losses"]


def import_losses(modules: Sequence[str]) -> dict[str, list[str]]:
    """Import modules, found from the current folder too; return the names of the losses that each has registered.

    Raises:
        ConfigError: there is no such module, it cannot be imported, or it registers no loss.
    """
    return {name: _registered_by(name) for name in modules}


def _registered_by(name: str) -> list[str]:
    before = _classes()
    module = load_module(name)
    after = _classes()
    found = sorted(loss for loss, kind in after.items() if loss not in before or _is_of(module, kind))
    if not found:
        raise ConfigError(
            f"{name} registers no loss: put @register (from pullback.losses) on its Loss classes, or leave --import {name} out"
        )
    return found


def _classes() -> Mapping[str, type[Loss]]:
    return {name: registry.get(name) for name in loss_names()}


def _is_of(module: ModuleType, kind: type[Loss]) -> bool:
    """Whether a module, which may have been imported before, defines a class or has it among its names."""
    return f"{kind.__module__}.".startswith(f"{module.__name__}.") or any(it is kind for it in vars(module).values())
