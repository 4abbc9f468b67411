"""The command line: ``pullback demo | serve | check | diff | plan | bench | losses | explain``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import PullbackError
from . import bench, check, demo, diff, explain, losses, plan, serve
from .arguments.parser import CommandParser

__all__ = ["command_parser", "main"]

_INTERRUPTED = 130  # as shells have it: 128 and the number of the signal
_COMMANDS = (demo, serve, check, diff, plan, bench, losses, explain)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = CommandParser(prog="pullback", description="Losses for post-training language models.")
    parser.add_argument(
        "--version", action="version", version=f"pullback {__version__}", help="print the version, and end"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = command_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except PullbackError as error:
        print(f"pullback: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pullback: interrupted", file=sys.stderr)
        return _INTERRUPTED
