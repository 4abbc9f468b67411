"""``pullback bench numerics`` and ``pullback check sampling``: measurements on a model of the user's choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

from ..backends import SamplingParams, TorchBackend
from ..backends.native import HFModel
from ..backends.native.execution.forward import score
from ..backends.prepared import ScoreRequest
from ..datums import Datum, ModelInput, datum_from_tokens_weights
from ..testing.agreement import sampling_agreement
from ..testing.models.llama import random_llama
from ..testing.numerics import NumericsRow, head_numerics, hidden_of, model_numerics
from .demo.models import smollm2_file

__all__ = ["bench_numerics", "check_sampling"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bench_numerics(arguments: argparse.Namespace) -> int:
    """Print how far log-probs are from fp64: of the head alone, of whole models, packed, and of the sampler."""
    exact = load(arguments.model, "float64")
    data = texts(exact, arguments.tokens)
    model: Any = exact.model
    hidden, targets = hidden_of(model, data)
    rows = head_numerics(hidden, model.head(), targets, _DTYPES)
    for dtype in ("float32", "bfloat16"):
        other = load(arguments.model, dtype)
        rows += model_numerics(model, {f"model, {dtype} weights": other.model}, data)
        rows += model_numerics(model, {f"model, {dtype} weights, packed": lambda r, m=other.model: _packed(m, r)}, data)
        found = sampling_agreement(other, [_prompt(d) for d in data], n=2)
        rows.append(NumericsRow(f"sampler against forward, {dtype}", found.largest, found.p99, found.mean))
        if dtype == "float32":
            rows += model_numerics(
                model, {"model, autocast to bfloat16": lambda r, m=other.model: _autocast(m, r)}, data
            )
    print(f"absolute differences of log-probs, nats; {targets.numel()} tokens of text, {arguments.model}")
    print(f"  {'':42}{'largest':>12}{'p99':>12}{'mean':>12}")
    for row in rows:
        print(f"  {row.what:42}{row.largest:12.2e}{row.p99:12.2e}{row.mean:12.2e}")
    print(json.dumps({"benchmark": "numerics", "model": arguments.model, "rows": [asdict(row) for row in rows]}))
    return 0


def check_sampling(arguments: argparse.Namespace) -> int:
    """Print how far the sampler's log-probs are from the trainer's; status 1 beyond the tolerance."""
    backend = load(arguments.model, arguments.dtype)
    prompts = [_prompt(datum) for datum in texts(backend, 512)]
    params = SamplingParams(max_tokens=32, temperature=arguments.temperature, seed=0)
    found = sampling_agreement(backend, prompts, n=4, params=params)
    tolerance = arguments.tolerance or {"float64": 1e-5, "float32": 1e-4}.get(arguments.dtype, 0.3)
    fine = found.largest <= tolerance
    print(f"{found.tokens} sampled tokens, {arguments.dtype}: differences of sampler and trainer, nats:")
    print(f"largest {found.largest:.2e}, p99 {found.p99:.2e}, mean {found.mean:.2e}; mean ratio {found.ratio_mean:.6f}")
    print(f"tolerance {tolerance:g}: {'they mean the same policy' if fine else 'THEY DIFFER'}")
    return 0 if fine else 1


def load(name: str, dtype: str) -> TorchBackend:
    """Return a backend on ``smollm2``, on ``tiny`` (a random Llama), or on a folder that transformers can load."""
    if name == "tiny":
        return TorchBackend(HFModel(random_llama(dtype=getattr(torch, dtype))), layout="single")
    path, file = smollm2_file() if name == "smollm2" else (Path(name), None)
    return TorchBackend.from_pretrained(path, gguf_file=file, dtype=dtype, layout="single")


def texts(backend: TorchBackend, tokens: int) -> list[Datum]:
    """Real text, in sequences of mixed length; random tokens where the model has no tokenizer."""
    lengths = [64, 128, 32, 160, 96, 48]
    found: list[Datum] = []
    if backend.tokenizer is None:
        stream = torch.randint(backend.vocab_size, (tokens + 6,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        stream = backend.tokenizer("\n".join(sorted(topics.topics.values())[:40]))["input_ids"][: tokens + 6]
    while len(stream) > 2 and sum(len(d.model_input) for d in found) < tokens:
        cut = lengths[len(found) % len(lengths)] + 1
        found.append(datum_from_tokens_weights(stream[:cut], [1.0] * len(stream[:cut])))
        stream = stream[cut:]
    return found


def _prompt(datum: Datum) -> ModelInput:
    return ModelInput.from_ints(datum.model_input.tokens[:12])


def _packed(model: Any, requests: Sequence[ScoreRequest]) -> Tensor:
    return score(model, requests, "packed")


def _autocast(model: Any, requests: Sequence[ScoreRequest]) -> Tensor:
    with torch.autocast(model.head().weight.device.type, torch.bfloat16):
        return score(model, requests, "single")
