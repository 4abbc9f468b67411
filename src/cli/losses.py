"""``pullback losses``: what is registered, with config keys, inputs and sources."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import Any, Final

from ..losses import Loss, loss_names, registry
from ..losses.config import config_keys

__all__ = ["add_parser"]

_HEAD: Final = (
    "Names and config keys for forward_backward(data, name, {...}); in Python see docs/losses.md.\n"
    "Inputs in brackets may be left out."
)


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    text = "list the registered losses, with their config keys and inputs"
    losses = commands.add_parser("losses", help=text, description=f"{text.capitalize()}.")
    losses.add_argument("name", nargs="*", help="names of losses (default: all)")
    losses.set_defaults(run=_list_losses)


def _list_losses(arguments: argparse.Namespace) -> int:
    chosen = [(name, registry.build(name)) for name in arguments.name or loss_names()]
    print(_HEAD)
    for name, loss in chosen:
        keys = ", ".join(f"{key}={default!r}" for key, default in config_keys(type(loss)).items())
        print(f"\n{name}: {_about(type(loss))}")
        print(f"  config keys and defaults: {keys or 'none'}")
        print(f"  inputs of each datum beside target_tokens: {_inputs(loss)}")
        print(f"  gradient kind: {loss.gradient_kind}; source: {'; '.join(loss.sources)}")
    return 0


def _about(kind: type[Loss]) -> str:
    """Return the first line of a class's docstring, without markup; a dataclass without one has its signature there."""
    lines = inspect.cleandoc(kind.__doc__ or "").splitlines()
    plain = lines[0].replace("`", "").partition("; see ")[0].rstrip(".") if lines else ""
    return "" if plain.startswith(f"{kind.__name__}(") else plain


def _inputs(loss: Loss) -> str:
    required, optional = _listed(loss.required_inputs), _listed(loss.optional_inputs)
    return ", ".join([*required, *(f"[{key}]" for key in optional)]) or "none"


def _listed(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if key != "target_tokens"]
