"""``pullback check sampling``: do a sampler and its trainer give a token the same log-prob?"""

from __future__ import annotations

import argparse
from typing import Any, Final

from ...backends import SamplingParams
from ...testing import sampling_agreement
from ..arguments.models import MODEL_HELP
from ..arguments.parser import DTYPES
from ..bench import example_text, load_backend, prompt_of

__all__ = ["add_parser"]

_TOLERANCES: Final = {"float64": 1e-5, "float32": 1e-4}
_HALF_PRECISION: Final = 0.3


def add_parser(checks: Any) -> None:
    """Add the command to a parser."""
    parser = checks.add_parser("sampling", help="sampler and trainer give a token the same log-prob")
    parser.add_argument("--model", default="smollm2", help=MODEL_HELP)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    parser.add_argument("--temperature", type=float, default=1.0, help="what the sampler divides logits by")
    limits = ", ".join(f"{limit:g} for {dtype}" for dtype, limit in _TOLERANCES.items())
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest difference of a log-prob that passes, nats (default: {limits}, {_HALF_PRECISION:g} for others)",
    )
    parser.set_defaults(run=_check_sampling)


def _check_sampling(arguments: argparse.Namespace) -> int:
    """Print how far the sampler's log-probs are from the trainer's; the status is 1 beyond the tolerance."""
    backend = load_backend(arguments.model, arguments.dtype)
    prompts = [prompt_of(datum) for datum in example_text(backend, 512)]
    params = SamplingParams(max_tokens=32, temperature=arguments.temperature, seed=0)
    agreement = sampling_agreement(backend, prompts, n=4, params=params)
    tolerance = arguments.tolerance or _TOLERANCES.get(arguments.dtype, _HALF_PRECISION)
    agree = agreement.largest <= tolerance
    print(f"{agreement.tokens} sampled tokens, {arguments.dtype}: differences of sampler and trainer, nats:")
    print(
        f"largest {agreement.largest:.2e}, p99 {agreement.p99:.2e}, mean {agreement.mean:.2e}; "
        f"mean ratio {agreement.ratio_mean:.6f}"
    )
    print(f"tolerance {tolerance:g}: {'they mean the same policy' if agree else 'THEY DIFFER'}")
    return 0 if agree else 1
