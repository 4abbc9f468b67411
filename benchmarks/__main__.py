"""Benchmarks: ``python -m benchmarks`` and one of the commands that ``--help`` lists.

A table for people; the last line is one JSON document. Works are interleaved in random order and ratios are medians of paired
rounds: only these mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from pullback.cli.bench import bench_numerics

from . import backends, custom, distributed, head, layouts, rows, splits, step
from .loss_functions import losses
from .serving import sampling, service


def main() -> None:
    """Run the benchmark that was asked for."""
    arguments = command_parser().parse_args()
    if "threads" in arguments:
        torch.set_num_threads(arguments.threads)
    arguments.run(arguments)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all benchmarks."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="benchmark")
    for add in (
        _heads,
        _steps,
        _custom,
        _layouts,
        _numerics,
        _backends,
        _losses,
        _distributed,
        _rows,
        _sampling,
        _service,
        _splits,
    ):
        add(commands)
    return parser


def _heads(commands: Any) -> None:
    parser = commands.add_parser("head", help="log-probs of a head, against bare products and others' fused losses")
    parser.add_argument("--shapes", default="smollm2,qwen", help="of smollm2, qwen, small")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--heads", default="frozen,trained")
    parser.add_argument("--positions", type=int, help="instead of the shape's own 4096 or 2048")
    parser.add_argument("--only", nargs="*", default=[], help="words of the rows to time; the bare products always are")
    _timed(parser, head.run)


def _steps(commands: Any) -> None:
    parser = commands.add_parser("step", help="a DPO and a GRPO step, against TRL's trainer")
    parser.add_argument("--rows", type=int, nargs="+", default=[4], help="sequences that TRL takes at once")
    parser.add_argument("--losses", default="dpo,grpo")
    _timed(parser, step.run)
    _on_a_model(parser)


def _custom(commands: Any) -> None:
    parser = commands.add_parser("custom", help="a custom function against the built-in loss")
    parser.add_argument("--length", type=int, default=256)
    _timed(parser, custom.run)
    _on_a_model(parser)


def _layouts(commands: Any) -> None:
    parser = commands.add_parser("layouts", help="packed, forked, padded, one by one")
    parser.add_argument("--layouts", default=",".join(layouts.LAYOUTS))
    parser.add_argument("--shares", default="0,0.25,0.5", help="of the shorter side of a pair")
    _timed(parser, layouts.run)
    _on_a_model(parser)


def _numerics(commands: Any) -> None:
    parser = commands.add_parser("numerics", help="log-probs against fp64, by dtype (also: pullback bench numerics)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.set_defaults(run=bench_numerics)


def _backends(commands: Any) -> None:
    parser = commands.add_parser("backends", help="native, our service (started by itself), and any URL")
    parser.add_argument(
        "--url", action="append", default=[], help="another service; may be repeated; key: TINKER_API_KEY"
    )
    parser.add_argument("--base-model", help="name of the model at these services")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--unembed", action="store_true", help="an adapter on the output projection too (a trained head)"
    )
    parser.add_argument("--out", default="backends.png", help="the picture")
    parser.set_defaults(run=backends.run)
    _in_rounds(parser)
    _on_a_model(parser)


def _service(commands: Any) -> None:
    words = "many clients of one service, turns between keys, an RL loop, adapters sampled together, bytes and memory"
    parser, usual = commands.add_parser("service", help=words), service.Sizes()
    parser.add_argument("--cases", default=",".join(service.CASES))
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--clients", default=",".join(map(str, usual.clients)), help="numbers of clients at once")
    for name in service.Sizes.__dataclass_fields__:
        if name != "clients":
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(usual, name))
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.set_defaults(run=service.run)


def _losses(commands: Any) -> None:
    parser = commands.add_parser("losses", help="the losses alone, against padded code written by hand")
    parser.add_argument("--sizes", default="256x1024,16x256", help="sequences x tokens")
    parser.add_argument("--only", nargs="*", default=[], help="words of the losses to time")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="without torch.compile")
    parser.add_argument("--peers", action="store_true", help="torchrl's, TRL's and verl's own functions too")
    parser.set_defaults(run=losses.run, threads=1)
    _in_rounds(parser)


def _distributed(commands: Any) -> None:
    words = "processes that train one model, against as many that train alone"
    parser = commands.add_parser("distributed", help=words)
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--tokens", default="512,2048,4096", help="of each process, a step")
    parser.add_argument("--reshard", action="store_true", help="free each layer after use")
    parser.set_defaults(run=distributed.run, threads=1)
    _in_rounds(parser)


def _rows(commands: Any) -> None:
    parser = commands.add_parser("rows", help="from_rows, against rendering and tokenizing each row once")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=16)
    parser.add_argument("--words", type=int, default=40, help="of each message")
    _timed(parser, rows.run)


def _sampling(commands: Any) -> None:
    words = "calls for one completion each at our service: all at once, one after another, and one call for all"
    parser = commands.add_parser("sampling", help=words)
    parser.add_argument("--model", default="tiny", help="as of `pullback serve`")
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8, help="different ones among the calls")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.set_defaults(run=sampling.run)
    _in_rounds(parser)


def _splits(commands: Any) -> None:
    words = "a step's gradient in several calls, against one call; the README's figure"
    parser = commands.add_parser("splits", help=words)
    parser.add_argument("--model", choices=("smollm2", "exact"), default="smollm2")
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--out", default="splits.svg", help="the figure")
    parser.set_defaults(run=splits.run)


def _timed(parser: argparse.ArgumentParser, run: Callable[[Any], None]) -> None:
    """Add what timings on a chosen number of threads share."""
    parser.set_defaults(run=run)
    _in_rounds(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others use the machine")


def _in_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9)


def _on_a_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--token-budget", type=int, default=2048)


if __name__ == "__main__":
    main()
