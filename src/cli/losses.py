"""``pullback losses``: what is registered, with config keys, inputs and sources."""

from __future__ import annotations

import argparse
from typing import Any

from ..losses import loss_names, registry
from ..losses.registry import config_keys

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    commands.add_parser("losses", help="list the registered losses").set_defaults(run=_list_losses)


def _list_losses(arguments: argparse.Namespace) -> int:
    for name in loss_names():
        loss = registry.get(name)
        keys = ", ".join(f"{key}={default!r}" for key, default in config_keys(loss).items())
        required = ", ".join(registry.build(name).required_inputs) or "none"
        print(f"{name}  ({loss.gradient_kind} kind; {'; '.join(loss.sources)})")
        print(f"  config: {keys}\n  required: {required}")
    return 0
