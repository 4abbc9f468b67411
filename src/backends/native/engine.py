"""The engine of the native backend: a PyTorch model, its accumulated gradients and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, final

import torch
from torch import Tensor, nn

from ...datums.types import ModelInput
from ...errors import BackendError, MissingReferenceError
from ..calls.prepared import PreparedCall
from ..calls.requests import ScoreRequest
from ..engine import Call, Engine, EngineLimits, Gradient, Scorer
from ..operations.normalization import Divisor, Ledger
from ..types import AdamParams, Plan, Rollout, SamplingParams
from .accumulator import Accumulator
from .causal_lm import CausalLM, as_causal_lm
from .checkpoints.checkpoint import load_checkpoint, save_checkpoint
from .checkpoints.export import Export
from .decoding.sampling import draw
from .dtensors import require_whole
from .execution.batching import Layout
from .execution.blame import blame
from .execution.cost_model import describe_model
from .execution.deferred_backward import DeferredBackward
from .execution.forward import keep_in_evaluation, model_device, score_forwards, trainable
from .execution.gradient import gradient_of
from .execution.memory import GraphMeter, MemoryBudget, Overflow
from .execution.retained import RetainedForward, retained_gradient
from .execution.scaling import GradientScale, autocasts_to_fp16
from .execution.scheduler import Scheduler
from .models.facts.model_facts import ModelFacts
from .models.facts.probes import layout_limits, measure_graph, require_causal
from .models.reference import FrozenReference
from .optimizer import Optimizer
from .plan import plan_call
from .snapshot import Snapshot
from .trained import TrainedWeights, require_not_merged

__all__ = ["NativeEngine"]


@final
class NativeEngine(Engine):
    """Everything that operations change, and the operations themselves.

    Attributes:
        model, module: the causal language model, and the same object as a module.
        weights_trained, parameters: what is trained, and the same by name.
        accumulator: the gradients since the last step.
        optimizer, generator: AdamW and the sampling generator.
        frozen: the reference; None where the model is its own, or has none.
        memory: how much of it a call may take.
        scheduler: cuts calls into forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reference: nn.Module | None,
        token_budget: int,
        activation_budget: float | None,
        overflow: Overflow,
        layout: Layout | Literal["auto"],
        max_length: int | None,
        checkpoint_dir: Path,
        seed: int,
        shard: Callable[[nn.Module], None] = lambda model: None,
    ) -> None:
        self.model, self.module = as_causal_lm(model), model
        require_whole(model)
        if not trainable(model):
            raise BackendError("the model has no parameter with requires_grad; nothing can be trained")
        require_not_merged(model)
        device = model_device(self.model)
        self.memory = MemoryBudget(token_budget, activation_budget, overflow, GraphMeter.of(model), device)
        model.eval()  # no dropout: policy and reference must be the same function
        head = self.model.head()
        facts = getattr(model, "facts", ModelFacts())
        context = facts.max_length if max_length is None else max_length
        self.limits = EngineLimits(int(head.weight.shape[0]), context, skips_positions=True, tempers=True)
        require_causal(self.model, self.vocab_size)
        self.frozen = None if reference is None else FrozenReference.of(reference, model, max_length)
        probed = layout_limits(self.model, self.vocab_size)
        layouts = (probed if self.frozen is None else probed.shared_with(self.frozen.layouts)).asked_for(layout)
        sizes = describe_model(model, head, float(getattr(model, "attention_flops_per_pair", 0.0)))
        self.scheduler = Scheduler(self.model, layouts, sizes, self.memory)
        measure_graph(self.model, self.vocab_size, layouts.allowed()[0], self.memory.meter)
        shard(model)  # what follows belongs to the weights of this process
        self.weights_trained = TrainedWeights(model)
        self.trained = self.parameters = self.weights_trained.parameters
        self.accumulator = Accumulator(self.parameters)
        self.accumulator.clear()  # what a model's earlier life has left there is not ours
        self.optimizer = Optimizer(self.parameters)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.weights = object()  # another one whenever they change
        self.weights_version, self.directory = 0, checkpoint_dir
        self._fp16 = any(p.dtype == torch.float16 for p in model.parameters())

    @property
    def vocab_size(self) -> int:  # V: rows of the head
        return self.limits.vocab_size or 0

    @property
    def _in_fp16(self) -> bool:
        return self._fp16 or autocasts_to_fp16(self.memory.device)

    def score(self, call: PreparedCall) -> list[Tensor]:
        return self._score(self.model, call)

    def accumulate(self, call: PreparedCall) -> Gradient:
        self.accumulator.require_own()
        self.weights_trained.require_same()

        def attempt() -> Gradient:
            scale = GradientScale(self.parameters.values(), self._in_fp16)
            with self.accumulator.adding(lambda: scale.value), torch.enable_grad():
                layout, batches = self.scheduler.gradient_batches(call)
                gradient = gradient_of(self.model, call, batches, self.memory.settings(layout), scale)
                self.accumulator.require_added(lambda: self.blame(call.requests))
            return gradient

        return self.memory.retry(attempt, call.lengths)

    def gather(self) -> None:
        """Do nothing: on one process the weights are whole."""

    def retain(self, call: PreparedCall, budget: float | None = None) -> RetainedForward:
        """Score all positions and retain the graphs; one beyond ``budget`` bytes will run again."""

        def attempt() -> DeferredBackward:
            layout, batches = self.scheduler.datums(call)
            settings = self.memory.settings(layout)
            given = settings if budget is None else replace(settings, budget=min(budget, settings.budget))
            graphs = DeferredBackward(self.model, given)
            for batch in batches:
                graphs.add(self.scheduler.micro_batch(call, batch, layout))
            return graphs

        graphs = self.memory.retry(attempt, call.lengths)
        scored = graphs.logprobs()
        logprobs = [scored[i].cpu() for i in range(len(call.data))]
        return RetainedForward(call.requests, graphs, logprobs, self.weights_version, self.weights, self._in_fp16)

    def accumulate_retained(
        self,
        call: PreparedCall,
        retained: Mapping[RetainedForward, Sequence[int]],
        prepare: Callable[[list[int]], PreparedCall],
    ) -> Gradient:
        """Add the gradient of a loss on forwards that were retained.

        Args:
            call: the call.
            retained: which of its datums each of a forward's is.
            prepare: makes a call of the datums that no forward has; they are scored now.
        """
        self.accumulator.require_own()
        self.weights_trained.require_same()
        rest = self.not_retained(call, retained)
        scale = GradientScale(self.parameters.values(), self._in_fp16 or any(r.fp16 for r in retained))
        with self.accumulator.adding(lambda: scale.value), torch.enable_grad():
            fresh = {self.retain(prepare(rest)): rest} if rest else {}
            gradient = retained_gradient(call, {**retained, **fresh}, sum(r.tokens for r in retained), scale)
            self.accumulator.require_added(lambda: self.blame(call.requests))
        return gradient

    def not_retained(self, call: PreparedCall, retained: Mapping[RetainedForward, Sequence[int]]) -> list[int]:
        """Return the datums of a call that no retained forward has scored.

        Raises:
            BackendError: a forward has served, is of other weights or of other datums, or two have the same place.
        """
        if any(r.weights is not self.weights or r.spent for r in retained):
            raise BackendError(
                "this retained forward has served already, or the weights have changed since; make it again"
            )
        places = [i for at in retained.values() for i in at]
        if len(set(places)) < len(places) or not all(0 <= i < len(call.data) for i in places):
            raise BackendError(f"each datum has one place among 0 to {len(call.data) - 1}, got the places {places}")
        for forward, at in retained.items():
            forward.require_same([call.requests[i] for i in at])
        return [i for i in range(len(call.data)) if i not in set(places)]

    def step(self, params: AdamParams, divisor: Divisor) -> Mapping[str, float]:
        self.accumulator.require_own()
        self.weights_trained.require_same()
        self.accumulator.require_finite(lambda: "the sum of calls that are finite one by one")
        return self.step_unchecked(params, divisor)

    def step_unchecked(
        self, params: AdamParams, divisor: Divisor, meet: Callable[[str], None] = lambda stage: None
    ) -> Mapping[str, float]:
        """Make a step on gradients that are known to be finite; see `step`, and `Optimizer.step` for ``meet``."""
        norm = self.optimizer.step(params, divisor.value, meet)
        self.weights = object()
        self.clear()
        self.weights_version += 1
        return {"grad_norm": norm}

    def clear(self) -> None:
        self.accumulator.clear()

    def gradients(self) -> Mapping[str, Tensor]:
        return self.accumulator.gradients

    def snapshot(self, weights: bool) -> Callable[[], None]:
        kept, before = Snapshot.take(self, weights), self.weights

        def restore() -> None:
            if self.weights is not before:
                kept.restore_weights(self)
                self.weights = object()
            kept.restore_gradients(self)

        return restore

    def plan(self, call: PreparedCall) -> Plan:
        return plan_call(self.scheduler, call)

    def reference(self) -> Scorer:
        frozen = self.frozen
        if frozen is not None:

            def score_frozen(call: PreparedCall) -> list[Tensor]:
                frozen.require_scorable(call)
                return self._score(frozen.model, call)

            return score_frozen
        base_only = self.base_only()

        def score_base(call: PreparedCall) -> list[Tensor]:
            with base_only():
                return self._score(self.model, call)

        return score_base

    def base_only(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what switches the adapter off, which makes a LoRA model its own reference.

        Raises:
            MissingReferenceError: there is no adapter.
        """
        base_only = getattr(self.module, "base_only", None)
        if base_only is None or not getattr(self.module, "is_lora", False):
            raise MissingReferenceError(
                "this backend trains all weights and was given no reference; pass reference=<a frozen copy of the model> to "
                "TorchBackend, or train with LoRA, whose base is the reference"
            )
        return cast(Callable[[], AbstractContextManager[None]], base_only)

    def save_weights(self, root: Path, name: str, overwrite: bool, ledger: Ledger) -> str:
        """Write the weights alone into a folder below ``root``; return the folder."""
        return save_checkpoint(self, root, name, overwrite, ledger, everything=False)

    def export(self, export: Export) -> str:
        """Write the model for others; return where."""
        export.check()
        return export.write(export.weights())

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> list[Rollout]:
        return draw(self.model, prompts, n, params, self.generator, self.weights_version)

    def save(self, name: str, overwrite: bool, ledger: Ledger) -> str:
        return save_checkpoint(self, self.directory, name, overwrite, ledger)

    def load(self, path: str, everything: bool) -> Ledger:
        require_not_merged(self.module)
        return load_checkpoint(self, Path(path), everything=everything)

    def begin(self, call: Call) -> None:
        if self.optimizer.half_stepped and call.operation not in ("load_state", "load_state_with_optimizer"):
            raise BackendError(
                "the last optimizer step or load was interrupted while it changed the weights or the optimizer's moments, so "
                "they are neither the old nor the new ones; call discard_gradients() and load the last checkpoint"
            )
        keep_in_evaluation(self.model, *([] if self.frozen is None else [self.frozen.model]))

    def close(self, timeout: float | None = None) -> None:
        self.clear()
        self.optimizer.reset()

    @torch.no_grad()
    def _score(self, model: CausalLM, call: PreparedCall) -> list[Tensor]:
        def attempt() -> list[Tensor]:
            scored = score_forwards(model, self.scheduler.forwards_of(call))
            return [scored[i] for i in range(len(call.data))]

        return self.memory.retry(attempt, call.lengths)

    def blame(self, requests: Sequence[ScoreRequest], members: Sequence[int] | None = None) -> str:
        """Name the first datum (of ``members``; default: all) whose own gradient is not finite."""
        asked = range(len(requests)) if members is None else members
        return blame(self.model, list(trainable(self.module).values()), requests, asked)
