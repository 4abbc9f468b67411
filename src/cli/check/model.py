"""``pullback check model``: does a model train as itself, at every length?"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from ...testing.modelcheck.check import check_model
from ..arguments.models import DEVICE_HELP, MODEL_HELP, load_named
from ..arguments.parser import DTYPES

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    model = commands.add_parser("model", help="log-probs, gradients, adapters, sampling against the model's own code")
    model.add_argument("path", help=MODEL_HELP)
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype that training would use")
    model.add_argument("--rank", type=int, default=8, help="rank of the adapter in the rows on LoRA")
    model.add_argument("--device", help=DEVICE_HELP)
    model.add_argument(
        "--long", action="store_true", help="test lengths beyond windows and contexts of more than 1,024 tokens too"
    )
    model.add_argument("--only", action="append", help="name of a row to check; may be given several times")
    model.add_argument("--json", action="store_true", help="print the rows as JSON")
    model.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Print the table; status 1 if a row is wrong or the model does not load."""

    def load() -> Any:
        return load_named(arguments.path, device=arguments.device).model

    options = {"only": arguments.only, "device": arguments.device}
    rows = check_model(load, dtype=arguments.dtype, lora=arguments.rank, long=arguments.long, **options)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        for row in rows:
            figure = "" if row.figure is None else f"{row.figure:.2g}"
            print(f"{row.name:44} {row.verdict:15} {figure:>8}  {row.reason}".rstrip())
        print(", ".join(f"{count} {verdict}" for verdict, count in Counter(row.verdict for row in rows).items()))
    return int(any(row.verdict == "wrong" for row in rows) or rows[0].verdict != "right")
