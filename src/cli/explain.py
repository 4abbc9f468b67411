"""``pullback explain``: datums as tables, token by token."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..datums import Datum, ModelInput

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("explain", help="print the datums of a JSON Lines file as tables")
    parser.add_argument("file", help='one {"model_input": [...], "loss_fn_inputs": {...}} per line')
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    for number, line in enumerate(Path(arguments.file).read_text().splitlines()):
        record = json.loads(line)
        datum = Datum(ModelInput.from_ints(record["model_input"]), record.get("loss_fn_inputs", {}))
        print(f"datum {number}\n{datum.explain()}\n")
    return 0
