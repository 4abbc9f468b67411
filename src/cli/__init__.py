"""The command line: ``pullback demo | serve | check | bench | losses | explain``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..datums import Datum, ModelInput
from ..errors import PullbackError
from ..losses import loss_names, registry
from ..losses.registry import config_keys
from . import check_backend as conformance
from . import check_model as own_model
from . import serve

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
    demo.add_argument(
        "--backend", choices=("native", "remote"), default="native", help="remote: on a service, started for the demo"
    )
    demo.add_argument("--minutes", type=float, default=12.0, help="time to fill, installation apart (default 12)")
    demo.add_argument("--only", help="some of sft,dpo,orpo,grpo")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument("--out", default="demo-results", help="folder for the picture and the figures")
    demo.set_defaults(run=_demo)
    serve.add_parser(commands)
    _add_measurements(commands)
    losses = commands.add_parser("losses", help="list the registered losses")
    losses.set_defaults(run=_losses)
    explain = commands.add_parser("explain", help="print the datums of a JSON Lines file as tables")
    explain.add_argument("file", help='one {"model_input": [...], "loss_fn_inputs": {...}} per line')
    explain.set_defaults(run=_explain)
    return parser


def _add_measurements(commands: Any) -> None:
    models = "smollm2, tiny (a random Llama), or a folder that transformers can load"
    check = commands.add_parser("check", help="does a model keep its promises?").add_subparsers(
        required=True, metavar="what"
    )
    conformance.add_parser(check)
    own_model.add_parser(check)
    sampling = check.add_parser("sampling", help="sampler and trainer mean the same policy")
    sampling.add_argument("--model", default="smollm2", help=models)
    sampling.add_argument("--dtype", default="float32")
    sampling.add_argument("--temperature", type=float, default=1.0)
    sampling.add_argument("--tolerance", type=float, help="largest difference in nats")
    sampling.set_defaults(run=_check_sampling)
    bench = commands.add_parser("bench", help="measure").add_subparsers(required=True, metavar="what")
    numerics = bench.add_parser("numerics", help="log-probs against fp64, by dtype")
    numerics.add_argument("--model", default="smollm2", help=models)
    numerics.add_argument("--tokens", type=int, default=1024)
    numerics.set_defaults(run=_bench_numerics)


def _check_sampling(arguments: argparse.Namespace) -> int:
    from .measure import check_sampling

    return check_sampling(arguments)


def _bench_numerics(arguments: argparse.Namespace) -> int:
    from .measure import bench_numerics

    return bench_numerics(arguments)


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
