"""The engine of the native backend: model, window and optimizer, and what each operation does to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ...datums.types import Datum, TensorData
from ...errors import BackendError, ConfigError, LeakyModelError, LossTypeError
from ...losses.base import Counts, Loss
from ...losses.metrics import wire_metrics
from ..arguments import as_loss, check_data
from ..custom import custom_name
from ..operations import require_unspoiled
from ..protocol import CustomLoss, NormalizationMode
from ..types import AdamParams, ForwardBackwardOutput, LedgerEntry, OptimStepOutput
from .accumulator import Window
from .causal_lm import CausalLM
from .execution.batching import Layout, ScoreRequest, loss_units, micro_batches, request
from .execution.budget import Room
from .execution.cost_model import choose_layout, describe_model
from .execution.deferred_backward import Overflow, Tape
from .execution.forward import model_device, score, trainable
from .execution.gradient import Gradient, custom_gradient, registered_gradient
from .execution.memory import GraphMeter
from .execution.retained import HeldForward, held_gradient
from .models.probes import isolated_layouts, measure_graph, require_causal
from .optimizer import Optimizer

__all__ = ["Engine", "Positions", "as_causal_lm"]

Positions = Literal["all", "trained"]


@final
class Engine:
    """Everything that operations change, and the operations themselves; they raise, they return plain results.

    Attributes:
        model, module: the adapter, and the same object as a module.
        parameters: what is trained, by name.
        window: the gradients since the last step.
        optimizer, generator: AdamW and the sampling generator.
        weights_version, operations: steps and gradient operations so far.
        layouts: those that keep sequences of one forward apart.
        sizes: what cost is made of.
        room: how much memory a call may take.
    """

    def __init__(
        self,
        model: nn.Module,
        token_budget: int,
        activation_budget: float | None,
        overflow: Overflow,
        layout: Layout | Literal["auto"],
        max_length: int | None,
        seed: int,
    ) -> None:
        self.model, self.module = as_causal_lm(model), model
        self.parameters = trainable(model)
        if not self.parameters:
            raise BackendError("the model has no parameter with requires_grad; nothing can be trained")
        self.room = Room(token_budget, activation_budget, overflow, GraphMeter.of(model), model_device(self.model))
        model.eval()  # no dropout: policy and reference must be the same function
        self.max_length = max_length
        head = self.model.head()
        self.vocab_size = int(head.weight.shape[0])
        require_causal(self.model, self.vocab_size)
        self.layouts = _allowed(layout, isolated_layouts(self.model, self.vocab_size))
        self.sizes = describe_model(model, head, float(getattr(model, "attention_flops_per_pair", 0.0)))
        measure_graph(self.model, self.vocab_size, self.layouts[0], self.room.meter)
        self.window = Window(self.parameters)
        self.optimizer = Optimizer(self.parameters)
        self.generator = torch.Generator(model_device(self.model)).manual_seed(seed)
        self.weights_version = 0
        self.operations = 0

    def check(
        self, data: Sequence[Datum], loss: Loss | None = None, positions: Positions = "all"
    ) -> list[ScoreRequest]:
        check_data(data, loss, vocab_size=self.vocab_size, max_length=self.max_length)
        return [request(datum, positions == "trained") for datum in data]

    def split(self, requests: Sequence[ScoreRequest], units: Sequence[Sequence[int]]) -> tuple[Layout, list[list[int]]]:
        lengths = [r.length for r in requests]
        layout = choose_layout(self.sizes, self.layouts, requests, self.room.tokens)
        return layout, micro_batches(units, lengths, self.room.tokens, layout)

    @torch.no_grad()
    def forward(
        self,
        model: CausalLM,
        data: Sequence[Datum],
        loss_fn: str | Loss = "cross_entropy",
        config: Mapping[str, Any] | None = None,
    ) -> ForwardBackwardOutput:
        loss = as_loss(loss_fn, config)
        requests = self.check(data, loss)

        def attempt() -> list[Tensor]:
            layout, batches = self.split(requests, [[i] for i in range(len(data))])
            found: dict[int, Tensor] = {}
            for batch in batches:
                packed = score(model, [requests[i] for i in batch], layout).cpu()
                found |= dict(zip(batch, torch.split(packed, [requests[i].length for i in batch]), strict=True))
            return [found[i] for i in range(len(data))]

        logprobs = self.room.fitting(attempt, [r.length for r in requests])
        output = loss.evaluate(loss.batch(data, logprobs))
        return _output(requests, logprobs, wire_metrics(output.metrics))

    def registered(
        self, data: Sequence[Datum], loss: Loss, counts: Counts | None, positions: Positions
    ) -> ForwardBackwardOutput:
        requests = self.check(data, loss, positions)
        self.window.ledger.admit(loss.name, loss.main_aggregation.denominator if counts is None else "none")

        def attempt() -> Gradient:
            layout, batches = self.split(requests, loss_units(loss, data))
            forwards = [self.forwards(requests, batch, layout) for batch in batches]
            settings = self.room.settings(layout)
            return registered_gradient(self.model, loss, data, requests, forwards, settings, counts)

        gradient = self._add(attempt, requests)
        self._record(loss.name, gradient, loss.normalization)
        return _output(requests, gradient.logprobs, gradient.metrics)

    def custom(self, data: Sequence[Datum], function: CustomLoss, positions: Positions) -> ForwardBackwardOutput:
        if not callable(function):
            raise LossTypeError(
                f"loss_fn must be a function (data, logprobs_list) -> (loss, metrics), got {function!r}"
            )
        requests = self.check(data, None, positions)
        self.window.ledger.admit(custom_name(function), "none")

        def attempt() -> Gradient:
            layout, batches = self.split(requests, [[i] for i in range(len(data))])
            return custom_gradient(self.model, function, data, requests, batches, self.room.settings(layout))

        gradient = self._add(attempt, requests)
        self._record(custom_name(function), gradient, "function")
        return _output(requests, gradient.logprobs, gradient.metrics)

    def hold(self, data: Sequence[Datum], budget: float | None = None) -> HeldForward:
        """Score all positions and keep the graphs; one beyond ``budget`` bytes will run again."""
        requests = self.check(data, None)

        def attempt() -> Tape:
            layout, batches = self.split(requests, [[i] for i in range(len(data))])
            settings = self.room.settings(layout)
            given = settings if budget is None else replace(settings, budget=min(budget, settings.budget))
            tape = Tape(self.model, given)
            for batch in batches:
                tape.add(batch, [requests[i] for i in batch])
            return tape

        tape = self.room.fitting(attempt, [r.length for r in requests])
        scored = tape.logprobs()
        return HeldForward(requests, tape, [scored[i].cpu() for i in range(len(data))], self.weights_version)

    def pull(
        self, held: Mapping[HeldForward, Sequence[int]], data: Sequence[Datum], loss: Loss
    ) -> ForwardBackwardOutput:
        """Add the gradient of a loss on forwards that were held; datums without one are scored now."""
        requests = self.check(data, loss)
        if any(one.weights_version != self.weights_version or one.spent for one in held):
            raise BackendError("this held forward was pulled already, or the weights have changed since; hold it again")
        for one, at in held.items():
            one.require_same([requests[i] for i in at])
        self.window.ledger.admit(loss.name, loss.main_aggregation.denominator)
        covered = {i for at in held.values() for i in at}
        rest = [i for i in range(len(data)) if i not in covered]
        with self.window.adding(), torch.enable_grad():
            fresh = {self.hold([data[i] for i in rest]): rest} if rest else {}
            gradient = held_gradient(loss, data, {**held, **fresh}, sum(one.tokens for one in held))
            self.window.require_finite(lambda: self._blame(requests))
        self._record(loss.name, gradient, loss.normalization)
        return _output(requests, gradient.logprobs, gradient.metrics)

    def step(self, params: AdamParams, mode: NormalizationMode) -> OptimStepOutput:
        if not isinstance(params, AdamParams):
            raise ConfigError(f"optim_step needs AdamParams, got {type(params).__name__}")
        require_unspoiled(self.window)
        divisor = self.window.ledger.divisor(mode)
        ledger = tuple(self.window.ledger.entries)
        if self.window.ledger.tokens == 0 or divisor.value == 0:
            self.window.clear()
            words = "empty window: no token has a gradient, so no step was made"
            return OptimStepOutput({"tokens": 0.0}, False, divisor.value, words, ledger)
        self.window.require_finite(lambda: "the sum of calls that are finite one by one")
        norm = self.optimizer.step(params, divisor.value)
        self.window.clear()
        self.weights_version += 1
        metrics = {
            "grad_norm": norm,
            "divided_by": divisor.value,
            "learning_rate": params.learning_rate,
            "tokens": float(sum(e.tokens for e in ledger)),
            "sequences": float(sum(e.sequences for e in ledger)),
        }
        return OptimStepOutput(metrics, True, divisor.value, divisor.words, ledger)

    def forwards(self, requests: Sequence[ScoreRequest], batch: Sequence[int], layout: Layout) -> list[list[int]]:
        """Split a batch of whole units further if it is larger than one forward may be."""
        lengths = {i: requests[i].length for i in batch}
        return micro_batches([[i] for i in batch], lengths, self.room.tokens, layout)

    def _add(self, attempt: Callable[[], Gradient], requests: Sequence[ScoreRequest]) -> Gradient:
        """Add a gradient to the window, all of it or nothing."""

        def added() -> Gradient:
            with self.window.adding(), torch.enable_grad():
                gradient = attempt()
                self.window.require_finite(lambda: self._blame(requests))
            return gradient

        return self.room.fitting(added, [r.length for r in requests])

    def _record(self, name: str, gradient: Gradient, fitting: str | None) -> None:
        self.operations += 1
        self.window.ledger.record(
            LedgerEntry(
                operation=self.operations,
                loss=name,
                datums=len(gradient.logprobs),
                tokens=gradient.tokens,
                sequences=gradient.sequences,
                denominator=gradient.denominator,
                count=gradient.count,
            ),
            fitting,
        )

    def _blame(self, requests: Sequence[ScoreRequest]) -> str:
        """Name the first datum whose own gradient is not finite."""
        parameters = list(self.parameters.values())
        for i, one in enumerate(requests):
            logprobs = score(self.model, [one], "single")
            found = torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True)
            if any(g is not None and not bool(torch.isfinite(g).all()) for g in found):
                return f"datum {i}"
        return "no single datum (their sum overflows)"


def as_causal_lm(model: Any) -> CausalLM:
    if not isinstance(model, nn.Module) or not isinstance(model, CausalLM):
        raise BackendError(
            f"model must be an nn.Module with hidden_states(tokens, positions) and head(), got {type(model).__name__}; "
            "a transformers model is wrapped by HFModel(model), or loaded by TorchBackend.from_pretrained"
        )
    return model


def _allowed(asked: Layout | Literal["auto"], isolated: Sequence[Layout]) -> Sequence[Layout]:
    if asked == "auto":
        return isolated
    if asked not in ("packed", "forked", "padded", "single"):
        raise ConfigError(f"layout must be auto, packed, forked, padded or single, got {asked!r}")
    if asked not in isolated:
        raise LeakyModelError(
            f"layout={asked!r}: this model lets sequences of one forward see each other; it keeps them apart in: "
            f"{', '.join(isolated)}; use one of these, or layout='auto'"
        )
    return (asked,)


def _output(
    requests: Sequence[ScoreRequest], logprobs: Sequence[Tensor], metrics: Mapping[str, float]
) -> ForwardBackwardOutput:
    outputs = []
    for one, values in zip(requests, logprobs, strict=True):
        output = {"logprobs": TensorData(values.detach())}
        if not bool(one.needed.all()):
            output["scored"] = TensorData(one.needed.to(torch.float32))
        outputs.append(output)
    return ForwardBackwardOutput(outputs, metrics)
