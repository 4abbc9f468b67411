"""The fake backend's engine: a table of logits, in closed form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ...datums.types import ModelInput
from ...errors import CheckpointError
from ..calls.cotangents import evaluate_all, summarize
from ..calls.prepared import PreparedCall
from ..engine import Call, Engine, EngineLimits, Gradient, Scorer
from ..operations.normalization import Divisor, Ledger
from ..sampling import drawn_seed, row_uniforms
from ..types import AdamParams, Rollout, SamplingParams
from .table import TableModel

__all__ = ["FakeEngine"]


@final
class FakeEngine(Engine):
    """A table, its accumulated gradient and its checkpoints.

    Attributes:
        model, base: the table, and a copy of how it began.
        gradient: what has accumulated.
        saved: checkpoints by name.
        calls: every operation, in order.
        faults: an error to raise in place of an operation, by its number.
    """

    def __init__(self, vocab_size: int, seed: int, stop: Sequence[int], faults: Mapping[int, Exception]) -> None:
        self.limits, self.stop = EngineLimits(vocab_size, tempers=True), frozenset(stop)
        self.model = TableModel.random(vocab_size, seed)
        self.base = copy.deepcopy(self.model)
        self.generator = torch.Generator().manual_seed(seed)
        self.gradient: Tensor | None = None
        self.weights_version = 0
        self.saved: dict[str, dict[str, Any]] = {}
        self.calls: list[Call] = []
        self.faults = dict(faults)

    def begin(self, call: Call) -> None:
        self.calls.append(call)
        fault = self.faults.pop(len(self.calls), None)
        if fault is not None:
            raise fault

    def score(self, call: PreparedCall) -> list[Tensor]:
        return _score(self.model, call)

    def accumulate(self, call: PreparedCall) -> Gradient:
        logprobs = self.score(call)
        cotangents = evaluate_all(call, logprobs)
        added = [self.model.backward(r, cotangents.by_datum[i]) for i, r in enumerate(call.requests)]
        total = torch.stack(added).sum(0)
        self.gradient = total if self.gradient is None else self.gradient + total
        output = call.output(logprobs, summarize([cotangents]))
        counted = (cotangents.tokens, cotangents.sequences, cotangents.denominator, cotangents.count)
        return Gradient(output, *counted, cotangents.by_datum)

    def step(self, params: AdamParams, divisor: Divisor) -> Mapping[str, float]:
        assert self.gradient is not None, "an empty accumulation makes no step"
        gradient = self.gradient / divisor.value
        norm = float(gradient.norm())
        shrink = min(1.0, params.grad_clip_norm / (norm + 1e-6)) if params.grad_clip_norm > 0 else 1.0
        self.model.adamw(shrink * gradient, params)
        self.weights_version += 1
        self.clear()
        return {"grad_norm": norm}

    def clear(self) -> None:
        self.gradient = None

    def snapshot(self, weights: bool) -> Callable[[], None]:
        kept = {"model": copy.copy(self.model), "gradient": self.gradient, "weights_version": self.weights_version}
        self.clear()
        return lambda: self.__dict__.update(kept)

    def gradients(self) -> Mapping[str, Tensor]:
        return {} if self.gradient is None else {"table": self.gradient}

    def reference(self) -> Scorer:
        return lambda call: _score(self.base, call)

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> list[Rollout]:
        given = [params.for_prompt(i).seed for i in range(len(prompts))]
        seeds = [drawn_seed(self.generator) if seed is None else seed for seed in given]
        stop = self.stop if params.stop is None else frozenset(params.stop)

        def rollout(index: int, prompt: ModelInput, row: int) -> Rollout:
            uniforms = row_uniforms(seeds[index], row)
            tokens, logprobs, tempered = self.model.complete(prompt.to_ints()[-1], params, stop, uniforms)
            reason = "stop" if tokens[-1] in stop else "length"
            how = (params.temperature, params.top_p, params.top_k)
            return Rollout(index, tokens, logprobs, reason, self.weights_version, *how, tempered)

        return [rollout(i, prompt, row) for i, prompt in enumerate(prompts) for row in range(n)]

    def save(self, name: str, overwrite: bool, ledger: Ledger) -> str:
        if name in self.saved and not overwrite:
            raise CheckpointError(f"there is a checkpoint {name!r} already; choose another name or overwrite=True")
        state = {"model": self.model, "gradient": self.gradient, "weights_version": self.weights_version}
        self.saved[name] = copy.deepcopy({**state, "ledger": ledger, "random": self.generator.get_state()})
        return name

    def load(self, path: str, everything: bool) -> Ledger:
        if path not in self.saved:
            raise CheckpointError(f"there is no checkpoint {path!r}; saved: {', '.join(self.saved) or 'none'}")
        saved = copy.deepcopy(self.saved[path])
        self.weights_version, model = saved["weights_version"], saved["model"]
        self.model = model if everything else TableModel.of(model.logits)
        self.clear()
        if not everything:
            return Ledger()
        self.gradient = saved["gradient"]
        self.generator.set_state(saved["random"])
        ledger: Ledger = saved["ledger"]
        return ledger


def _score(model: TableModel, call: PreparedCall) -> list[Tensor]:
    return [model.score(request) for request in call.requests]
