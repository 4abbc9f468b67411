"""Objects that the command line names by their place: ``package.module:name``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ...errors import ConfigError

__all__ = ["object_at"]


def object_at(place: str) -> Any:
    """Return what stands at ``package.module:name``, found from the current folder too.

    Raises:
        ConfigError: there is no such thing.
    """
    module, colon, name = place.partition(":")
    if not colon:
        raise ConfigError(f"give package.module:name, got {place!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"there is no {place}: {error}") from error
    return found
