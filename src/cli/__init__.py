"""The command line: ``pullback demo | losses | explain``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..datums import Datum, ModelInput
from ..errors import PullbackError
from ..losses import loss_names, registry
from ..losses.registry import config_keys

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except PullbackError as error:
        print(f"pullback: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pullback", description="Losses for post-training language models.")
    parser.add_argument("--version", action="version", version=f"pullback {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="train SFT, DPO, ORPO and GRPO on a real model")
    demo.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    demo.add_argument("--minutes", type=float, default=12.0, help="time to fill, installation apart (default 12)")
    demo.add_argument("--only", help="some of sft,dpo,orpo,grpo")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument("--out", default="demo-results", help="folder for the picture and the figures")
    demo.set_defaults(run=_demo)
    losses = commands.add_parser("losses", help="list the registered losses")
    losses.set_defaults(run=_losses)
    explain = commands.add_parser("explain", help="print the datums of a JSON Lines file as tables")
    explain.add_argument("file", help='one {"model_input": [...], "loss_fn_inputs": {...}} per line')
    explain.set_defaults(run=_explain)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import main as run

    return run(arguments)


def _losses(arguments: argparse.Namespace) -> int:
    for name in loss_names():
        loss = registry.get(name)
        keys = ", ".join(f"{key}={default!r}" for key, default in config_keys(loss).items())
        required = ", ".join(registry.build(name).required_inputs) or "none"
        print(
            f"{name}  ({loss.gradient_kind} kind; {'; '.join(loss.sources)})\n  config: {keys}\n  required: {required}"
        )
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    for number, line in enumerate(Path(arguments.file).read_text().splitlines()):
        given = json.loads(line)
        datum = Datum(ModelInput.from_ints(given["model_input"]), given.get("loss_fn_inputs", {}))
        print(f"datum {number}\n{datum.explain()}\n")
    return 0
