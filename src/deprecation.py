"""Old spellings of public names: they work for one release and say what to write instead."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

__all__ = ["moved", "renamed_keyword", "replaced"]

P = ParamSpec("P")
R = TypeVar("R")


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


def renamed_keyword(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator under which a function still takes the keyword ``old`` for its argument ``new``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if old in kwargs:
                message = f"the argument {old} of {function.__qualname__} is now {new}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def replaced(new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator under which a function still works, and warns that its place is taken by another.

    Args:
        new: how to write the call now, dotted below ``pullback``.
    """
    package = __name__.rpartition(".")[0]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            warnings.warn(f"{function.__qualname__} is now {package}.{new}", DeprecationWarning, stacklevel=2)
            return function(*args, **kwargs)

        return call

    return decorate
