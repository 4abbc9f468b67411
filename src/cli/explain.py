"""``pullback explain``: datums as tables, token by token."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..datums import Datum, ModelInput
from ..errors import ConfigError

__all__ = ["DATUMS_HELP", "add_parser", "read_datums"]

DATUMS_HELP: Final = 'one {"model_input": [...], "loss_fn_inputs": {...}} per line; the latter may be left out'


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("explain", help="print the datums of a JSON Lines file as tables")
    parser.add_argument("file", help=DATUMS_HELP)
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    for number, datum in enumerate(read_datums(arguments.file)):
        print(f"datum {number}\n{datum.explain()}\n")
    return 0


def read_datums(file: str) -> Iterator[Datum]:
    """Read the datums of a JSON Lines file, one after the other.

    Raises:
        ConfigError: it cannot be read, or a line is no datum.
    """
    try:
        lines = Path(file).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    return (_datum(f"{file}, line {number + 1}", line) for number, line in enumerate(lines))


def _datum(place: str, line: str) -> Datum:
    try:
        record = json.loads(line)
        return Datum(ModelInput.from_ints(record["model_input"]), record.get("loss_fn_inputs", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{place}: a line is {{"model_input": [...], "loss_fn_inputs": {{...}}}}, the latter if there is any; got '
            f"{line[:60]!r} ({type(error).__name__}: {error})"
        ) from error
