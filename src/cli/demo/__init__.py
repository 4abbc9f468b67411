"""``pullback demo``: four objectives on a real model, through the backend protocol alone."""

from __future__ import annotations

import argparse
from typing import Any

from ..arguments.models import MODEL_HELP

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("demo", help="train SFT, DPO, ORPO and GRPO on a real model")
    parser.add_argument("--model", default="smollm2", help=MODEL_HELP)
    parser.add_argument(
        "--backend",
        choices=("native", "remote"),
        default="native",
        help="remote: train at a service that is started for the demo",
    )
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="minutes that the demo may take, without installation"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="rows of your own, JSON Lines: texts, chats, pairs, questions with answers (default: the demo's own tasks)",
    )
    parser.add_argument(
        "--only", help="objectives to train, some of sft,dpo,orpo,grpo, separated by commas (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of data, and of the samples")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument("--out", default="demo-results", help="folder for the picture and the figures")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from .run import main  # it needs rich and matplotlib, which the other commands do without

    return main(arguments)
