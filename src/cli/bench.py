"""``pullback bench numerics``: how far a model's log-probs are from fp64."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

from ..backends import TorchBackend
from ..backends.calls.requests import ScoreRequest
from ..backends.native import HFModel
from ..backends.native.execution.forward import score
from ..datums import Datum, ModelInput, datum_from_tokens_weights
from ..testing.agreement import sampling_agreement
from ..testing.modelcheck.numerics import NumericsRow, head_numerics, hidden_of, model_numerics
from .arguments.models import MODEL_HELP, load_named

__all__ = ["add_parser", "bench_numerics", "example_text", "load_backend", "prompt_of"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LENGTHS = (64, 128, 32, 160, 96, 48)


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    benchmarks = commands.add_parser("bench", help="measure a model").add_subparsers(required=True, metavar="what")
    numerics = benchmarks.add_parser("numerics", help="log-probs against fp64, by dtype")
    numerics.add_argument("--model", default="smollm2", help=MODEL_HELP)
    numerics.add_argument("--tokens", type=int, default=1024, help="tokens of text that are scored")
    numerics.set_defaults(run=bench_numerics)


def bench_numerics(arguments: argparse.Namespace) -> int:
    """Print how far log-probs are from fp64: those of the head, of the whole model, packed, and of the sampler."""
    exact = load_backend(arguments.model, "float64")
    data = example_text(exact, arguments.tokens)
    hidden, targets = hidden_of(exact.model, data)  # type: ignore[arg-type]
    rows = head_numerics(hidden, exact.model.head(), targets, _DTYPES)  # type: ignore[operator]
    for dtype in ("float32", "bfloat16"):
        rows += _model_rows(exact.model, arguments.model, dtype, data)
    print(f"absolute differences of log-probs, nats; {targets.numel()} tokens of text, {arguments.model}")
    print(f"  {'':42}{'largest':>12}{'p99':>12}{'mean':>12}")
    for row in rows:
        print(f"  {row.what:42}{row.largest:12.2e}{row.p99:12.2e}{row.mean:12.2e}")
    print(json.dumps({"benchmark": "numerics", "model": arguments.model, "rows": [asdict(row) for row in rows]}))
    return 0


def _model_rows(exact: Any, name: str, dtype: str, data: Sequence[Datum]) -> list[NumericsRow]:
    """Compare the model in ``dtype``: one sequence at a time, packed, sampled from, and (fp32) under autocast."""
    backend = load_backend(name, dtype)
    model: Any = backend.model
    variants = {
        f"model, {dtype} weights": model,
        f"model, {dtype} weights, packed": lambda requests: score(model, requests, "packed"),
    }
    rows = model_numerics(exact, variants, data)
    agreement = sampling_agreement(backend, [prompt_of(datum) for datum in data], n=2)
    rows.append(NumericsRow(f"sampler against forward, {dtype}", agreement.largest, agreement.p99, agreement.mean))
    if dtype == "float32":
        rows += model_numerics(exact, {"model, autocast to bfloat16": lambda r: _autocast_score(model, r)}, data)
    return rows


def load_backend(name: str, dtype: str) -> TorchBackend:
    """Return a backend on a named model that scores one sequence at a time; see `load_named`."""
    loaded = load_named(name, dtype=dtype)
    return TorchBackend(HFModel(loaded.model), tokenizer=loaded.tokenizer, layout="single")


def example_text(backend: TorchBackend, tokens: int) -> list[Datum]:
    """Return real text in sequences of mixed length, or random tokens if the model has no tokenizer."""
    if backend.tokenizer is None:
        stream = torch.randint(backend.vocab_size, (tokens + 6,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        stream = backend.tokenizer("\n".join(sorted(topics.topics.values())[:40]))["input_ids"][: tokens + 6]
    data: list[Datum] = []
    lengths = cycle(_LENGTHS)
    while len(stream) > 2 and sum(len(datum.model_input) for datum in data) < tokens:
        cut = next(lengths) + 1
        data.append(datum_from_tokens_weights(stream[:cut], [1.0] * len(stream[:cut])))
        stream = stream[cut:]
    return data


def prompt_of(datum: Datum) -> ModelInput:
    """Return the first twelve tokens of a datum."""
    return ModelInput.from_ints(datum.model_input.tokens[:12])


def _autocast_score(model: Any, requests: Sequence[ScoreRequest]) -> Tensor:
    with torch.autocast(model.head().weight.device.type, torch.bfloat16):
        return score(model, requests, "single")
