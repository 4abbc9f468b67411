"""``pullback losses``: what is registered, with config keys, inputs and sources."""

from __future__ import annotations

import argparse
from typing import Any

from ..losses import loss_names, registry
from ..losses.config import config_keys

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    commands.add_parser("losses", help="list the registered losses").set_defaults(run=_list_losses)


def _list_losses(arguments: argparse.Namespace) -> int:
    for name in loss_names():
        loss = registry.build(name)
        keys = ", ".join(f"{key}={default!r}" for key, default in config_keys(type(loss)).items())
        required = ", ".join(loss.required_inputs) or "none"
        print(f"{name}  (gradient: {loss.gradient_kind}; {'; '.join(loss.sources)})")
        print(f"  config: {keys}\n  required: {required}")
    return 0
