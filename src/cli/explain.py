"""``pullback explain``: datums as tables, token by token."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ..datums import Datum, ModelInput
from ..errors import ConfigError
from .arguments.json_lines import numbered_lines

__all__ = ["DATUMS_HELP", "add_parser", "read_datums"]

DATUMS_HELP: Final = 'one {"model_input": [...], "loss_fn_inputs": {...}} per line; the latter may be left out'
_EXPECTED: Final = 'a line is {"model_input": [...], "loss_fn_inputs": {...}}, the latter if there is any'


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
    return (_datum(file, number, line) for number, line in numbered_lines(file))


def _datum(file: str, number: int, line: str) -> Datum:
    place = f"{file}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: {_EXPECTED}; got {line[:60]!r}, which is no JSON: {error}") from error
    if not isinstance(record, Mapping) or "model_input" not in record:
        raise ConfigError(f"{place}: {_EXPECTED}; got {_found(file, record)}")
    try:
        return Datum(ModelInput.from_ints(record["model_input"]), record.get("loss_fn_inputs", {}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {_EXPECTED}; got {line[:60]!r}: {error}") from error


def _found(file: str, record: Any) -> str:
    """Return what stands in the place of a datum; for the row of a data set, how datums are made of it."""
    if not isinstance(record, Mapping):
        return type(record).__name__
    return (
        f"the keys {', '.join(map(str, record)) or '(none)'}. Rows of a data set become datums in Python: "
        f"rows = [json.loads(line) for line in open({file!r})], then data, report = from_rows(rows, tokenizer) of "
        "pullback.datums; data[0].explain(tokenizer) is the table"
    )
