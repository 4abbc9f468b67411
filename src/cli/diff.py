"""``pullback diff``: where two backends diverge."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import torch

from ..backends import AdamParams, Backend
from ..datums import Datum
from ..errors import ConfigError, PullbackError
from ..testing.backend_diff import diff
from ..testing.examples import example_datums
from .arguments.backends import BACKEND_HELP, NamedBackend, model_of, open_backend
from .arguments.parser import DTYPES
from .check.loss import load
from .explain import DATUMS_HELP, read_datums

__all__ = ["add_parser"]

_LENGTHS: Final = "64,128,32,160,96,48"
_RANK: Final = 8  # of both adapters, where one side is a service
_VOCAB_SIZE: Final = 17  # where neither side tells; every real vocabulary is larger


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser(
        "diff", help="where two backends diverge: log-probs, loss, cotangent, gradient, update"
    )
    for side in "ab":
        parser.add_argument(f"--{side}", required=True, help=BACKEND_HELP)
        parser.add_argument(
            f"--dtype-{side}", choices=DTYPES, default="float32", help=f"dtype of the weights of {side}"
        )
    parser.add_argument("--loss", default="cross_entropy", help="registered name, or package.module:function")
    parser.add_argument("--loss-config", type=_mapping, help='hyperparameters as JSON, e.g. {"kl_beta": 0.1}')
    parser.add_argument("--data", help=f"JSON Lines: {DATUMS_HELP}; default: random tokens, near the policy of a")
    parser.add_argument(
        "--lengths",
        default=_LENGTHS,
        help="tokens of the random datums; choose lengths beyond a sliding window to test it",
    )
    parser.add_argument("--base-model", help="name of the base model at a service (default: MODEL of the other side)")
    parser.add_argument(
        "--rank", type=int, help=f"rank of adapters (default: {_RANK} if a side is a service, else none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of adapters and random datums")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="learning rate of the update that is compared"
    )
    parser.add_argument(
        "--allow-step", action="store_true", help="allow a step at a service, whose model cannot be restored"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Print the report; the status is 1 if the two differ."""
    with ExitStack() as stack:
        a, b = (_opened(arguments, side, stack) for side in "ab")
        data = _data(arguments, a, b)
        found = diff(
            a.backend,
            b.backend,
            load(arguments.loss) if ":" in arguments.loss else arguments.loss,
            data,
            loss_fn_config=arguments.loss_config,
            names=(a.name, b.name),
            dtypes=(arguments.dtype_a, arguments.dtype_b),
            params=AdamParams(arguments.learning_rate, eps=1e-6),
            tokenizer=a.tokenizer or b.tokenizer,
            allow_step=arguments.allow_step,
        )
    print(found)
    if arguments.json is not None:
        arguments.json.write_text(found.to_json() + "\n")
    return int(found.diverges)


def _opened(arguments: argparse.Namespace, side: str, stack: ExitStack) -> NamedBackend:
    name, other = (arguments.a, arguments.b) if side == "a" else (arguments.b, arguments.a)
    remote = any(each.startswith("remote:") for each in (name, other))
    found = open_backend(
        name,
        dtype=getattr(arguments, f"dtype_{side}"),
        rank=arguments.rank or (_RANK if remote else None),
        seed=arguments.seed,
        base_model=arguments.base_model or model_of(other),
    )
    stack.callback(_close, found.backend)
    return found


def _close(backend: Backend) -> None:
    with suppress(PullbackError):
        backend.close()


def _data(arguments: argparse.Namespace, a: NamedBackend, b: NamedBackend) -> list[Datum]:
    if arguments.data is not None:
        return list(read_datums(arguments.data))
    try:
        lengths = [int(length) for length in arguments.lengths.split(",")]
    except ValueError as error:
        raise ConfigError(f"--lengths is numbers with commas, e.g. {_LENGTHS}; got {arguments.lengths!r}") from error
    known = [side.vocab_size for side in (a, b) if side.vocab_size is not None]
    return _near(a.backend, example_datums(lengths, arguments.seed, min(known, default=_VOCAB_SIZE)))


def _near(backend: Backend, data: Sequence[Datum]) -> list[Datum]:
    """Return the datums with log-probs of a rollout policy and a reference near this backend's."""
    generator = torch.Generator().manual_seed(0)
    scored = backend.forward(data).result().loss_fn_outputs
    found = []
    for datum, output in zip(data, scored, strict=True):
        own = output["logprobs"].to_torch().float()
        logprobs, reference = (own + 0.1 * torch.randn(own.shape, generator=generator) for _ in range(2))
        found.append(datum.with_inputs(logprobs=logprobs, ref_logprobs=reference))
    return found


def _mapping(text: str) -> Mapping[str, Any]:
    value = json.loads(text)  # what argparse reports if it is none
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"it is a mapping in JSON, got {text!r}")
    return value
