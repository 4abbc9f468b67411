"""How far the gradient of a step moves when the step is cut into calls; measured, and drawn as the figure of the README."""

from __future__ import annotations

import json
import math
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pullback import Datum, TorchBackend
from pullback.datums import datum_from_prompt_completion
from pullback.losses import CrossEntropy
from pullback.testing import TinyLM

from .models import load
from .splits_figure import Split, draw
from .timing import environment

__all__ = ["LENGTHS", "measure", "run", "texts"]

LENGTHS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 30, 40, 50, 60, 75, 90)  # trained tokens of each sequence
PROMPT = 8
Gradient = dict[str, Tensor]


def texts(ids: Sequence[int], lengths: Sequence[int] = LENGTHS) -> list[Datum]:
    """Return pieces of a text, each with a prompt that is not trained."""
    data, start = [], 0
    for length in lengths:
        piece = ids[start : start + PROMPT + length]
        data.append(datum_from_prompt_completion(piece[:PROMPT], piece[PROMPT:]))
        start += PROMPT + length
    return data


def measure(backend: TorchBackend, data: list[Datum], calls: Sequence[int] = (2, 4, 8, 16)) -> list[Split]:
    """Return the distances from the gradient of one call."""
    whole = _gradient(backend, [data])
    found = []
    for count in calls:
        size = -(-len(data) // count)
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        own = [_gradient(backend, [part]) for part in parts]
        added = {name: torch.stack([each[name] for each in own]).sum(0) for name in whole}
        averaged = {name: gradient / len(parts) for name, gradient in added.items()}
        found.append(Split(len(parts), *(_distance(g, whole) for g in (_gradient(backend, parts), added, averaged))))
    return found


def _gradient(backend: TorchBackend, parts: Sequence[list[Datum]]) -> Gradient:
    for part in parts:
        backend.forward_backward(part, CrossEntropy("token_mean")).result()
    gradients = backend.gradients()
    backend.discard_gradients()
    return {name: gradient.double() for name, gradient in gradients.items()}


def _distance(a: Gradient, b: Gradient) -> float:
    difference, size = (math.sqrt(sum(float(x.square().sum()) for x in each)) for each in (_minus(a, b), b.values()))
    return difference / size


def _minus(a: Gradient, b: Gradient) -> list[Tensor]:
    return [a[name] - b[name] for name in b]


def run(arguments: Any) -> None:
    """Measure the splits on a model, print them, and draw them."""
    if arguments.model == "exact":
        backend = TorchBackend(TinyLM(max_positions=128))
        ids = torch.randint(17, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        backend = load("smollm2", lora=8, dtype="float32", token_budget=arguments.token_budget)
        ids = backend.tokenizer(pydoc_data.topics.topics["specialnames"][:8000])["input_ids"]
    splits = measure(backend, texts(ids))
    print(f"{'calls':>6}{'deferred':>12}{'added up':>12}{'averaged':>12}")
    for split in splits:
        print(f"{split.calls:>6}{split.deferred:>12.2g}{split.added:>12.2g}{split.averaged:>12.2g}")
    name = "SmolLM2-135M, LoRA, fp32" if arguments.model == "smollm2" else "a small model in fp64"
    Path(arguments.out).write_text(draw(splits, f"Relative error of a step's gradient ({name})"))
    print(json.dumps({"benchmark": "splits", "environment": environment(), "splits": [s._asdict() for s in splits]}))
