"""``pullback explain``: datums as tables, token by token."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..datums import Datum, ModelInput
from ..errors import ConfigError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("explain", help="print the datums of a JSON Lines file as tables")
    parser.add_argument(
        "file", help='one {"model_input": [...], "loss_fn_inputs": {...}} per line; the latter may be left out'
    )
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    try:
        lines = Path(arguments.file).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {arguments.file}: {error.strerror}") from error
    for number, line in enumerate(lines):
        print(f"datum {number}\n{_datum(f'{arguments.file}, line {number + 1}', line).explain()}\n")
    return 0


def _datum(place: str, line: str) -> Datum:
    try:
        record = json.loads(line)
        return Datum(ModelInput.from_ints(record["model_input"]), record.get("loss_fn_inputs", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{place}: a line is {{"model_input": [...], "loss_fn_inputs": {{...}}}}, the latter if there is any; got '
            f"{line[:60]!r} ({type(error).__name__}: {error})"
        ) from error
