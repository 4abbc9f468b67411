"""Benchmarks: ``python -m benchmarks`` and one of the commands that ``--help`` lists.

A table for people; the last line is one JSON document. Works are interleaved in random order and ratios are medians of paired
rounds: only these mean anything on a shared machine.
"""

from __future__ import annotations

import argparse

import torch

from pullback.cli.bench import bench_numerics

from . import backends, custom, distributed, head, layouts, losses, rows, splits, step


def main() -> None:
    """Run the benchmark that was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="benchmark")
    one = commands.add_parser("head", help="log-probs of a head, against bare products and others' fused losses")
    one.add_argument("--shapes", default="smollm2,qwen", help="of smollm2, qwen, small")
    one.add_argument("--dtypes", default="float32,bfloat16")
    one.add_argument("--heads", default="frozen,trained")
    one.add_argument("--positions", type=int, help="instead of the shape's own 4096 or 2048")
    one.add_argument("--only", nargs="*", default=[], help="words of the rows to time; the bare products always are")
    one.set_defaults(run=head.run)
    two = commands.add_parser("step", help="a DPO and a GRPO step, against TRL's trainer")
    two.add_argument("--rows", type=int, nargs="+", default=[4], help="sequences that TRL takes at once")
    two.add_argument("--losses", default="dpo,grpo")
    two.set_defaults(run=step.run)
    three = commands.add_parser("custom", help="a custom function against the built-in loss")
    three.add_argument("--length", type=int, default=256)
    three.set_defaults(run=custom.run)
    five = commands.add_parser("layouts", help="packed, forked, padded, one by one")
    five.add_argument("--layouts", default=",".join(layouts.LAYOUTS))
    five.add_argument("--shares", default="0,0.25,0.5", help="of the shorter side of a pair")
    five.set_defaults(run=layouts.run)
    four = commands.add_parser("numerics", help="log-probs against fp64, by dtype (also: pullback bench numerics)")
    four.add_argument("--model", default="smollm2")
    four.add_argument("--tokens", type=int, default=1024)
    four.set_defaults(run=bench_numerics)
    six = commands.add_parser("backends", help="native, our service (started by itself), and any URL")
    six.add_argument("--url", action="append", default=[], help="another service; may be repeated; key: TINKER_API_KEY")
    six.add_argument("--base-model", help="name of the model at these services")
    six.add_argument("--length", type=int, default=256)
    six.add_argument("--rank", type=int, default=8)
    six.add_argument("--unembed", action="store_true", help="an adapter on the output projection too (a trained head)")
    six.add_argument("--out", default="backends.png", help="the picture")
    six.set_defaults(run=backends.run)
    seven = commands.add_parser("losses", help="the losses alone, against padded code written by hand")
    seven.add_argument("--sizes", default="256x1024,16x256", help="sequences x tokens")
    seven.add_argument("--only", nargs="*", default=[], help="words of the losses to time")
    seven.add_argument("--no-compiled", dest="compiled", action="store_false", help="without torch.compile")
    seven.add_argument("--peers", action="store_true", help="torchrl's, TRL's and verl's own functions too")
    seven.set_defaults(run=losses.run, threads=1)
    eight = commands.add_parser("distributed", help="processes that train one model, against as many that train alone")
    eight.add_argument("--ranks", type=int, default=2, help="processes")
    eight.add_argument("--tokens", default="512,2048,4096", help="of each process, a step")
    eight.add_argument("--reshard", action="store_true", help="free each layer after use")
    eight.set_defaults(run=distributed.run, threads=1)
    nine = commands.add_parser("rows", help="from_rows, against rendering and tokenizing each row once")
    nine.add_argument("--rows", type=int, default=10_000)
    nine.add_argument("--messages", type=int, default=16)
    nine.add_argument("--words", type=int, default=40, help="of each message")
    nine.set_defaults(run=rows.run)
    ten = commands.add_parser(
        "splits", help="a step's gradient in several calls, against one call; the README's figure"
    )
    ten.add_argument("--model", choices=("smollm2", "exact"), default="smollm2")
    ten.add_argument("--token-budget", type=int, default=2048)
    ten.add_argument("--out", default="splits.svg", help="the figure")
    ten.set_defaults(run=splits.run)
    for command in (one, two, three, five, six, seven, eight, nine):
        command.add_argument("--rounds", type=int, default=9)
    for command in (one, two, three, five, nine):
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument(
            "--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others use the machine"
        )
    for command in (two, three, five, six):
        command.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
        command.add_argument("--sequences", type=int, default=16)
        command.add_argument("--token-budget", type=int, default=2048)
    arguments = parser.parse_args()
    if "threads" in arguments:
        torch.set_num_threads(arguments.threads)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
