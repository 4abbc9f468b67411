"""``pullback check loss | backend | model | sampling``: what can be shown of a loss, a backend, a model, and a sampler."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

from ..backends import FakeBackend, SamplingParams, TorchBackend, TrainerBackend, connect
from ..testing import PROMISES, BackendUnderTest, TinyLM, sampling_agreement
from . import check_loss, check_model
from .bench import example_text, load_backend, prompt_of
from .models import MODEL_HELP

__all__ = ["add_parser"]

_VOCAB_SIZE = 17  # token ids of the example datums; every real vocabulary is larger


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    checks = commands.add_parser("check", help="does a loss, a backend or a model keep its promises?").add_subparsers(
        required=True, metavar="what"
    )
    backend = checks.add_parser("backend", help="every promise of a backend, by its verbs alone")
    backend.add_argument("--url", help="of a service (default: the native backend)")
    backend.add_argument("--base-model", help="its name there")
    backend.add_argument("--rank", type=int, default=8, help="of the adapter there")
    backend.add_argument("--kind", choices=("native", "fake"), default="native", help="without --url")
    backend.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest relative difference of two updates that should be equal"
    )
    backend.set_defaults(run=_check_backend)
    check_loss.add_parser(checks)
    check_model.add_parser(checks)
    sampling = checks.add_parser("sampling", help="sampler and trainer give a token the same log-prob")
    sampling.add_argument("--model", default="smollm2", help=MODEL_HELP)
    sampling.add_argument("--dtype", default="float32")
    sampling.add_argument("--temperature", type=float, default=1.0)
    sampling.add_argument("--tolerance", type=float, help="largest difference in nats")
    sampling.set_defaults(run=_check_sampling)


def _check_backend(arguments: argparse.Namespace) -> int:
    """Print a line for each promise; the status is 1 if one is broken."""
    under_test = BackendUnderTest(_maker(arguments), _VOCAB_SIZE, arguments.tolerance)
    broken = 0
    for name, check in PROMISES.items():
        try:
            check(under_test)
            verdict = "kept"
        except Exception as error:  # a broken backend may raise anything
            broken += 1
            verdict = f"BROKEN: {type(error).__name__}: {error}"
        print(f"{name.replace('_', ' '):34} {verdict}", flush=True)
    print(f"{len(PROMISES) - broken} of {len(PROMISES)} promises kept")
    return 1 if broken else 0


def _maker(arguments: argparse.Namespace) -> Callable[[], TrainerBackend]:
    if arguments.url is not None:
        lora = {"seed": 0}
        return lambda: connect(arguments.url, base_model=arguments.base_model, rank=arguments.rank, lora=lora)
    if arguments.kind == "fake":
        return FakeBackend
    return lambda: TorchBackend(TinyLM(_VOCAB_SIZE), checkpoint_dir=tempfile.mkdtemp())


def _check_sampling(arguments: argparse.Namespace) -> int:
    """Print how far the sampler's log-probs are from the trainer's; the status is 1 beyond the tolerance."""
    backend = load_backend(arguments.model, arguments.dtype)
    prompts = [prompt_of(datum) for datum in example_text(backend, 512)]
    params = SamplingParams(max_tokens=32, temperature=arguments.temperature, seed=0)
    agreement = sampling_agreement(backend, prompts, n=4, params=params)
    tolerance = arguments.tolerance or {"float64": 1e-5, "float32": 1e-4}.get(arguments.dtype, 0.3)
    agree = agreement.largest <= tolerance
    print(f"{agreement.tokens} sampled tokens, {arguments.dtype}: differences of sampler and trainer, nats:")
    print(
        f"largest {agreement.largest:.2e}, p99 {agreement.p99:.2e}, mean {agreement.mean:.2e}; "
        f"mean ratio {agreement.ratio_mean:.6f}"
    )
    print(f"tolerance {tolerance:g}: {'they mean the same policy' if agree else 'THEY DIFFER'}")
    return 0 if agree else 1
