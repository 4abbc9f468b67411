"""``pullback check loss | backend | model | data | sampling``: what can be shown of each of them."""

from __future__ import annotations

from typing import Any

from . import backend, data, loss, model, sampling

__all__ = ["add_parser"]

_CHECKS = (backend, loss, model, data, sampling)


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    checks = commands.add_parser("check", help="test a loss, a backend, a model, data or sampling").add_subparsers(
        required=True, metavar="what"
    )
    for check in _CHECKS:
        check.add_parser(checks)
