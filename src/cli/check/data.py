"""``pullback check data``: does a builder of training examples train the answers, their ends, and nothing else?"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import Any, Final

from ...errors import ConfigError
from ...testing.datacheck import BUILDER_ROWS, DataRow, TinyTokenizer, check_builder
from ..arguments.models import folder_named
from ..arguments.object_references import load_object

__all__ = ["add_parser"]

_TOKENIZER_HELP: Final = "tiny (characters, ChatML), smollm2, or a folder with a tokenizer and a chat template"


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    data = commands.add_parser("data", help="which tokens a builder of training examples trains")
    data.add_argument(
        "builder", help="package.module:function that turns messages (and a tokenizer) into a datum or input_ids"
    )
    data.add_argument("--tokenizer", default="tiny", help=_TOKENIZER_HELP)
    data.add_argument(
        "--only", action="append", choices=list(BUILDER_ROWS), help="name of a row to check; may be given several times"
    )
    data.add_argument("--json", action="store_true", help="print the rows as JSON")
    data.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Print the table; status 1 if a row is wrong."""
    build, tokenizer = load_object(arguments.builder), _tokenizer(arguments.tokenizer)
    rows = check_builder(build, tokenizer, only=arguments.only)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(rows)
    return int(any(row.verdict == "wrong" for row in rows))


def _print(rows: list[DataRow]) -> None:
    for row in rows:
        print(f"{row.name:12} {row.verdict:15} {row.reason}".rstrip())
        for line in row.example.splitlines():
            print(f"    {line}")
    print(", ".join(f"{count} {verdict}" for verdict, count in Counter(row.verdict for row in rows).items()))


def _tokenizer(name: str) -> Any:
    if name == "tiny":
        return TinyTokenizer()
    from ...backends.native.models.tokenizers import load_tokenizer

    expected = f"--tokenizer must be {_TOKENIZER_HELP}"
    found = load_tokenizer(folder_named(name, expected))
    if found is None or not getattr(found, "chat_template", None):
        raise ConfigError(f"{expected}, got {name!r}, which has none")
    return found
