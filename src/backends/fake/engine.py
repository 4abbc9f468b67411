"""What the operations of the fake backend do; they raise, they return plain results."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ...datums.types import Datum, ModelInput
from ...errors import BackendError, CheckpointError, ConfigError, InvalidDatumsError, LossTypeError
from ...losses.base import Counts, Loss
from ..arguments import as_loss, check_data
from ..cotangents import Cotangents, scored, target_cotangents
from ..custom import custom_name
from ..normalization import Ledger
from ..operations import require_unspoiled
from ..protocol import CustomLoss, NormalizationMode
from ..types import AdamParams, ForwardBackwardOutput, LedgerEntry, OptimStepOutput, Rollout, SamplingParams
from .table import TableModel

__all__ = ["Engine"]


@final
class Engine:
    """A table, its window and its checkpoints.

    Attributes:
        model, base: the table, and a copy of how it began.
        gradient, ledger, failures: the window.
        weights_version, operations: steps and gradient operations so far.
        saved: checkpoints by name.
    """

    def __init__(self, vocab_size: int, seed: int, stop: Sequence[int]) -> None:
        self.vocab_size, self.stop = vocab_size, frozenset(stop)
        self.model = TableModel.random(vocab_size, seed)
        self.base = copy.deepcopy(self.model)
        self.generator = torch.Generator().manual_seed(seed)
        self.gradient: Tensor | None = None
        self.ledger, self.failures = Ledger(), list[BaseException]()
        self.weights_version = self.operations = 0
        self.saved: dict[str, dict[str, Any]] = {}

    def clear(self) -> None:
        """Empty the window."""
        self.gradient, self.ledger, self.failures = None, Ledger(), []

    def check(self, data: Sequence[Datum], loss: Loss | None) -> None:
        check_data(data, loss, vocab_size=self.vocab_size)

    def forward(
        self, model: TableModel, data: Sequence[Datum], loss_fn: str | Loss, config: Mapping[str, Any] | None
    ) -> ForwardBackwardOutput:
        loss = as_loss(loss_fn, config)
        self.check(data, loss)
        logprobs = [model.score(datum) for datum in data]
        return ForwardBackwardOutput.of(logprobs, loss(data, logprobs)[1])

    def registered(self, data: Sequence[Datum], loss: Loss, counts: Counts | None) -> ForwardBackwardOutput:
        self.check(data, loss)
        self.ledger.admit(loss.name, loss.main_aggregation.denominator if counts is None else "none")
        return self._add(loss, loss.name, data, counts)

    def custom(self, data: Sequence[Datum], function: CustomLoss) -> ForwardBackwardOutput:
        if not callable(function):
            raise LossTypeError(
                f"loss_fn must be a function (data, logprobs_list) -> (loss, metrics), got {function!r}"
            )
        self.check(data, None)
        self.ledger.admit(custom_name(function), "none")
        return self._add(function, custom_name(function), data, None)

    def step(self, params: AdamParams, mode: NormalizationMode) -> OptimStepOutput:
        if not isinstance(params, AdamParams):
            raise ConfigError(f"optim_step needs AdamParams, got {type(params).__name__}")
        require_unspoiled(self)
        divisor, entries, gradient = self.ledger.divisor(mode), tuple(self.ledger.entries), self.gradient
        if gradient is None or self.ledger.tokens == 0 or divisor.value == 0:
            self.clear()
            words = "empty window: no token has a gradient, so no step was made"
            return OptimStepOutput({"tokens": 0.0}, False, divisor.value, words, entries)
        gradient = gradient / divisor.value
        norm = float(gradient.norm())
        shrink = min(1.0, params.grad_clip_norm / (norm + 1e-6)) if params.grad_clip_norm > 0 else 1.0
        self.model.adamw(shrink * gradient, params)
        self.weights_version += 1
        self.clear()
        metrics = {"grad_norm": norm, "divided_by": divisor.value, "learning_rate": params.learning_rate}
        return OptimStepOutput(metrics, True, divisor.value, divisor.words, entries)

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> list[Rollout]:
        empty = [f"prompt {i}: is empty; give at least one token" for i, p in enumerate(prompts) if len(p) == 0]
        if empty:
            raise InvalidDatumsError(empty)
        seeds = [params.for_prompt(i).seed for i in range(len(prompts))]
        generators = [self.generator if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
        stop = self.stop if params.stop is None else frozenset(params.stop)

        def rollout(index: int, prompt: ModelInput) -> Rollout:
            tokens, logprobs = self.model.complete(prompt.to_ints()[-1], params, stop, generators[index])
            reason = "stop" if tokens[-1] in stop else "length"
            how = (params.temperature, params.top_p, params.top_k)
            return Rollout(index, tokens, logprobs, reason, self.weights_version, *how)

        return [rollout(i, prompt) for i, prompt in enumerate(prompts) for _ in range(n)]

    def save(self, name: str, overwrite: bool) -> None:
        if name in self.saved and not overwrite:
            raise CheckpointError(f"there is a checkpoint {name!r} already; choose another name or overwrite=True")
        kept = {key: getattr(self, key) for key in ("model", "gradient", "ledger", "weights_version")}
        self.saved[name] = copy.deepcopy({**kept, "random": self.generator.get_state()})

    def load(self, name: str, everything: bool) -> None:
        if name not in self.saved:
            raise CheckpointError(f"there is no checkpoint {name!r}; saved: {', '.join(self.saved) or 'none'}")
        if self.ledger.entries:
            raise BackendError(
                "the window holds gradients of the present weights; call optim_step or discard_gradients() before loading"
            )
        found = copy.deepcopy(self.saved[name])
        if not everything:
            self.model, self.weights_version = TableModel.of(found["model"].logits), found["weights_version"]
            return
        self.generator.set_state(found.pop("random"))
        for key, value in found.items():
            setattr(self, key, value)

    def _add(
        self, loss: Loss | CustomLoss, name: str, data: Sequence[Datum], counts: Counts | None
    ) -> ForwardBackwardOutput:
        logprobs = [self.model.score(scored(datum)) for datum in data]
        found = target_cotangents(loss, name, data, logprobs, counts)
        pulled = torch.stack([self.model.pull(d, c) for d, c in zip(found.data, found.cotangents, strict=True)]).sum(0)
        self.gradient = pulled if self.gradient is None else self.gradient + pulled
        self._record(found)
        return ForwardBackwardOutput.of(logprobs, found.metrics)

    def _record(self, found: Cotangents) -> None:
        self.operations += 1
        counted = (len(found.data), found.tokens, found.sequences)
        entry = LedgerEntry(self.operations, found.name, *counted, found.denominator, found.count)
        self.ledger.record(entry, found.fitting)
