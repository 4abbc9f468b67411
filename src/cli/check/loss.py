"""``pullback check loss``: is a loss sound? Anybody's, by its place in a module, or a registered one by its name."""

from __future__ import annotations

import argparse
import ast
import json
from typing import Any, get_args

from ...errors import ConfigError, require_extra, suggestion
from ...losses import loss_names, registry
from ...losses.base import GradientKind
from ...testing.losscheck import FORMS, INVARIANCES, LOSS_PROPERTIES, loss_report
from ..arguments.object_references import load_object
from ..arguments.parser import listing

__all__ = ["add_parser", "load"]

_EXAMPLES, _FAST = 60, 6


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    loss = commands.add_parser(
        "loss",
        help="every property of a loss",
        description="Check a loss, anybody's: its value, its gradient, what it may depend on, and what it must not.",
        epilog=listing("properties", {name: each.proves for name, each in LOSS_PROPERTIES.items()}),
    )
    loss.add_argument("loss", help="package.module:function, or the name of a registered loss")
    loss.add_argument("--form", choices=FORMS[1:], help="how the loss is called, where its signature does not tell")
    loss.add_argument(
        "--kind",
        choices=get_args(GradientKind),
        help="what the gradient of one token may depend on: nothing, the token, its sequence, its pair, the batch "
        "(default: what the loss declares)",
    )
    loss.add_argument(
        "--argument",
        action="append",
        default=[],
        type=_argument,
        metavar="NAME=VALUE",
        help="value of an argument that is the function's own, e.g. beta=0.1; may be given several times",
    )
    loss.add_argument(
        "--per-sequence",
        action="append",
        metavar="NAME",
        help="name of an input of which there is one number per sequence, e.g. advantages; may be given several times",
    )
    loss.add_argument(
        "--detached",
        action="append",
        default=[],
        metavar="NAME",
        help="name of an argument that no gradient may flow into; may be given several times",
    )
    loss.add_argument(
        "--invariant",
        action="append",
        choices=INVARIANCES,
        help="a shift of the inputs that may not change the gradient; may be given several times",
    )
    loss.add_argument(
        "--only", action="append", help="name of a property to check, see below; may be given several times"
    )
    loss.add_argument("--examples", type=int, default=_EXAMPLES, help="random batches per property")
    loss.add_argument("--fast", action="store_true", help=f"{_FAST} batches per property: a few seconds")
    loss.add_argument("--json", action="store_true", help="print the results as JSON")
    loss.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Print the table; status 1 if a property fails."""
    require_extra("hypothesis", "test", "pullback check loss")
    report = loss_report(
        load(arguments.loss),
        form=arguments.form,
        kind=arguments.kind,
        detached=arguments.detached,
        arguments=dict(arguments.argument) or None,
        per_sequence=arguments.per_sequence,
        invariant=arguments.invariant,
        only=arguments.only,
        examples=_FAST if arguments.fast else arguments.examples,
    )
    print(json.dumps(report.as_json(), indent=1) if arguments.json else report)
    return int(bool(report.failed))


def _argument(text: str) -> tuple[str, Any]:
    """Return the name and the value of ``name=value``, which is Python, or else a word."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, e.g. beta=0.1")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def load(place: str) -> Any:
    """Return what stands at ``package.module:name``, found from the current folder too, or a registered loss.

    Raises:
        ConfigError: there is no such thing.
    """
    if ":" not in place:
        if place not in loss_names():
            close = suggestion(place, loss_names())
            file = f" (here: {place.removesuffix('.py')}:function)" if place.endswith(".py") else ""
            raise ConfigError(
                f"no loss is registered as {place!r}{close}; a function is given as package.module:function{file}"
            )
        return registry.build(place)
    return load_object(place)
