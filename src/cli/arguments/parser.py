"""The parser of every command: its help shows all defaults, and lists stay lists."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from typing import Any, Final, final

__all__ = ["DTYPES", "CommandParser", "listing"]

DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


@final
class _Help(argparse.HelpFormatter):
    """Adds the default to the help of each option that has one, and keeps the lines of descriptions and lists."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        unsaid = default is None or default is False or default == [] or default is argparse.SUPPRESS
        if not text or unsaid or "(default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=f"{indent}      ")
            for line in text.splitlines()
        )


@final
class CommandParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` with this help; so are the parsers of its commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **options})


def listing(title: str, entries: Mapping[str, str]) -> str:
    """Return a title and one line for each entry, for the end of a help."""
    width = max(map(len, entries), default=0)
    return "\n".join([f"{title}:", *(f"  {name:{width}}  {text}" for name, text in entries.items())])
