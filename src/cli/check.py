"""``pullback check loss | backend | model | data | sampling``: what can be shown of each of them."""

from __future__ import annotations

import argparse
from typing import Any

from ..backends import SamplingParams
from ..testing import sampling_agreement
from . import check_backend, check_data, check_loss, check_model
from .bench import example_text, load_backend, prompt_of
from .models import MODEL_HELP

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    checks = commands.add_parser(
        "check", help="does a loss, a backend, a model or a builder of data keep its promises?"
    ).add_subparsers(required=True, metavar="what")
    check_backend.add_parser(checks)
    check_loss.add_parser(checks)
    check_model.add_parser(checks)
    check_data.add_parser(checks)
    sampling = checks.add_parser("sampling", help="sampler and trainer give a token the same log-prob")
    sampling.add_argument("--model", default="smollm2", help=MODEL_HELP)
    sampling.add_argument("--dtype", default="float32")
    sampling.add_argument("--temperature", type=float, default=1.0)
    sampling.add_argument("--tolerance", type=float, help="largest difference in nats")
    sampling.set_defaults(run=_check_sampling)


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
