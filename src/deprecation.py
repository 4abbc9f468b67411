"""Old spellings of public names: they work for one release and say what to write instead."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["moved"]


def moved(module: str, names: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that still finds renamed names.

    Args:
        module: ``__name__`` of the module that had the old names.
        names: old name -> (module that has the new one, dotted below ``pullback``; new name).
    """
    package = __name__.rpartition(".")[0]

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, new = names[name]
        warnings.warn(f"{module}.{name} is now {package}.{home}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(f"{package}.{home}"), new)

    return find
