"""Objects that the command line names as entry points do: ``package.module:name``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ...errors import ConfigError

__all__ = ["load_object"]


def load_object(reference: str) -> Any:
    """Return the object that ``package.module:name`` refers to, found from the current folder too.

    Raises:
        ConfigError: there is no such thing.
    """
    module, colon, name = reference.partition(":")
    if not colon:
        raise ConfigError(f"give package.module:name, got {reference!r}")
    if module.endswith(".py"):
        place = module.removesuffix(".py").replace("/", ".")
        raise ConfigError(f"{reference!r} names a file: give its module, {place}:{name}, as in an import")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{module} is there, but cannot be imported: {error}") from error
        raise ConfigError(f"there is no {reference}: {error}") from error
    except AttributeError as error:
        raise ConfigError(f"there is no {reference}: {error}") from error
    return found
