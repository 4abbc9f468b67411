"""``pullback plan``: what training would take on each process, from a model's config alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from ..backends.native.distributed.budget import Placement
from ..errors import require_extra
from .arguments.models import CONFIG_HELP, config_named
from .arguments.parser import DTYPES

if TYPE_CHECKING:
    from ..backends.native.distributed.plan import TrainingBudget

__all__ = ["add_parser"]

_GIB: Final = 2**30
_CHOICES: Final = {"true": (True,), "false": (False,), "both": (False, True)}


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    plan = commands.add_parser(
        "plan",
        help="memory of each process, and bytes sent between processes",
        description="Memory of each process, and bytes sent between processes, in training; no weight is loaded.",
    )
    plan.add_argument("--model", required=True, help=CONFIG_HELP)
    plan.add_argument("--ranks", type=int, default=1, help="processes that train the model together")
    plan.add_argument("--replicas", type=int, default=1, help="groups of processes that hold the whole model each")
    plan.add_argument("--tokens", type=int, default=4096, help="tokens of one micro-batch on a process")
    plan.add_argument("--micro-batches", type=int, default=1, help="micro-batches of one process in a step")
    plan.add_argument("--calls", type=int, default=1, help="gradient operations of a step")
    plan.add_argument(
        "--function",
        action="store_true",
        help="plan for a custom loss (a Python function): the graphs of all micro-batches are retained",
    )
    plan.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights; adapters are fp32")
    plan.add_argument(
        "--lora", type=int, help="rank of an adapter on all linear layers (default: everything is trained)"
    )
    plan.add_argument("--gradient-checkpointing", action="store_true", help="layers are recomputed in the backward")
    plan.add_argument(
        "--graph-bytes-per-token",
        type=float,
        help="bytes that autograd retains per token as measured, for layers that are not Llama's (default: computed)",
    )
    plan.add_argument(
        "--reshard", choices=sorted(_CHOICES), default="both", help="whether gathered layers are freed after use"
    )
    plan.add_argument("--vocab-parallel", action="store_true", help="each process holds some rows of the head")
    plan.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda",
        help="where it would run: chunks of logits are larger on a GPU",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object a line")
    plan.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    require_extra("transformers", "hf", "pullback plan")
    config = config_named(arguments.model)
    choices = _CHOICES[arguments.reshard] if arguments.ranks > 1 else (False,)
    placements = [Placement(arguments.ranks, arguments.replicas, reshard) for reshard in choices]
    budgets = [_budget(config, placement, arguments) for placement in placements]
    print("\n".join(json.dumps(each.to_json()) for each in budgets) if arguments.json else _table(budgets))
    return 0


def _budget(config: Any, placement: Placement, arguments: argparse.Namespace) -> TrainingBudget:
    from ..backends.native.distributed.plan import plan_training

    return plan_training(
        config,
        placement,
        tokens=arguments.tokens,
        dtype=arguments.dtype,
        lora=arguments.lora,
        gradient_checkpointing=arguments.gradient_checkpointing,
        micro_batches=arguments.micro_batches,
        retained=arguments.micro_batches if arguments.function else 1,
        calls=arguments.calls,
        graph_bytes_per_token=arguments.graph_bytes_per_token,
        vocab_parallel=arguments.vocab_parallel,
        gpu=arguments.device == "cuda",
    )


def _table(budgets: Sequence[TrainingBudget]) -> str:
    """Return parts as rows, one column a placement, in GiB."""
    first = budgets[0]
    lines = [
        f"{first.parameters:,} parameters, {first.trained:,} trained; GiB of one of {first.placement.ranks} processes"
    ]
    if first.placement.sharded:
        names = ["layers freed" if each.placement.reshard else "gathered once" for each in budgets]
        lines.append(f"  {'':24}" + "".join(f"{name:>16}" for name in names))
    for title, found in (
        ("held", [each.memory.to_json() for each in budgets]),
        ("received in a step", [each.traffic.to_json() for each in budgets]),
    ):
        lines.append(title)
        for part in found[0]:
            lines.append(f"  {part.replace('_', ' '):24}" + "".join(f"{each[part] / _GIB:16.3f}" for each in found))
    return "\n".join(lines)
