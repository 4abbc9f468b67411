"""Files of JSON Lines, as commands are given them."""

from __future__ import annotations

from pathlib import Path

from ...errors import ConfigError

__all__ = ["numbered_lines"]


def numbered_lines(file: str | Path) -> list[tuple[int, str]]:
    """Return the lines of a file that are not blank, with their numbers from 1.

    A line ends at a line feed alone: in a text of JSON other separators, as U+2028, may stand as they are.

    Raises:
        ConfigError: the file cannot be read as UTF-8.
    """
    try:
        lines = Path(file).read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {file} as UTF-8: {error}") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
