"""Modules, and objects in them, that the command line names: found from the current folder too."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import ConfigError

__all__ = ["load_module", "load_object"]


def load_object(reference: str) -> Any:
    """Return the object that ``package.module:name`` refers to, found from the current folder too.

    Raises:
        ConfigError: there is no such thing.
    """
    module, colon, name = reference.partition(":")
    if not colon:
        raise ConfigError(f"give package.module:name, got {reference!r}")
    if module.endswith(".py"):
        raise ConfigError(f"{reference!r} names a file: give its module, {_module_of(module)}:{name}, as in an import")
    try:
        found: Any = _imported(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise _missing(reference, module, error) from error
    except AttributeError as error:
        raise ConfigError(f"there is no {reference}: {error}") from error
    return found


def load_module(name: str) -> ModuleType:
    """Return the module of this name, found from the current folder too.

    Raises:
        ConfigError: there is none, or it raises an error of any kind.
    """
    if name.endswith(".py") or "/" in name:
        raise ConfigError(f"{name!r} names a file: give its module, {_module_of(name)}, as in an import")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"give a module, as in an import (package.module), got {name!r}")
    try:
        return _imported(name)
    except ModuleNotFoundError as error:
        raise _missing(name, name, error) from error
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{name} is there, but cannot be imported: {type(error).__name__}: {error}") from error


def _imported(module: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(module)


def _module_of(file: str) -> str:
    return file.removesuffix(".py").strip("./").replace("/", ".")


def _missing(reference: str, module: str, error: ModuleNotFoundError) -> ConfigError:
    """Say that a module is not there, or that one is not which it imports."""
    if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
        return ConfigError(f"{module} is there, but cannot be imported: {error}")
    return ConfigError(f"there is no {reference}: {error}")
