"""The native engine on several processes: each scores its share of a call, and all of them agree before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, final

import torch
from torch import Tensor

from ....datums.types import ModelInput
from ....errors import UnsupportedError
from ...cotangents import evaluate
from ...engine import Call, Engine, Gradient, Scorer
from ...normalization import Divisor, Ledger
from ...prepared import PreparedCall
from ...types import AdamParams, Plan, Rollout, SamplingParams
from ..accumulator import Accumulator
from ..causal_lm import CausalLM
from ..dtensors import full
from ..engine import NativeEngine
from ..execution.deferred_backward import DeferredBackward
from ..execution.forward import score_forwards, trainable
from ..execution.gradient import (
    RetainedForward,
    Streamed,
    backward_retained,
    require_finite_logprobs,
    reuse,
    streamed,
    summary,
)
from ..execution.memory import GraphSettings
from ..execution.scaling import GradientScale
from .agreement import Agreement
from .digest import tensor_digest
from .exchange import agreed_cotangents, gather_metrics, require_finite_gradients, require_same_call
from .plan import plan_rank
from .ranks import Ranks
from .schedule import Schedule, Share
from .sharding import Shards
from .state import ShardedFiles, load_sharded, save_sharded

__all__ = ["DistributedEngine"]

T = TypeVar("T")


@final
class DistributedEngine(Engine):
    """The operations of a `NativeEngine` whose model is sharded over the processes of a mesh.

    Every process is given the same call and returns the same result.

    Args:
        local: this process's part.
        shards: its model's.
        ranks: the processes.
        agreement: of them.
        reference: the shards of the reference model, if there is one.
    """

    def __init__(
        self, local: NativeEngine, shards: Shards, ranks: Ranks, agreement: Agreement, reference: Shards | None
    ) -> None:
        self.local, self._shards, self._ranks, self._reference = local, shards, ranks, reference
        self.limits = local.limits
        self._agreement = agreement
        self._files = ShardedFiles(ranks, agreement, shards.masters)
        local.memory.agreed = ranks.least
        self._schedule = Schedule(local.scheduler, ranks, in_step=shards.reshard)

    @property
    def weights_version(self) -> int:  # type: ignore[override]  # the local engine counts
        """Optimizer steps so far."""
        return self.local.weights_version

    @contextmanager
    def operation(self, call: Call) -> Iterator[None]:
        with self._agreement.operation(call.operation):
            self.local.begin(call)
            yield

    def score(self, call: PreparedCall) -> list[Tensor]:
        return self._score(self.local.model, self._shards, call)

    def accumulate(self, call: PreparedCall) -> Gradient:
        require_same_call(self._agreement, call, self.weights_version)
        add = self._function if call.registered is None or call.gradient_kind == "batch" else self._stream
        return self._retried(call, lambda: self._added(lambda: add(call)))

    def step(self, params: AdamParams, divisor: Divisor) -> Mapping[str, float]:
        settings = f"{params}, gradient divided by {divisor.value}, at step {self.weights_version}"
        self._agreement.meet("choice of settings", text=settings)
        self._require_finite("the sum of calls that are finite one by one")
        self._shards.release()
        reached: list[str] = []

        def meet(stage: str) -> None:
            self._agreement.meet(stage)
            reached.append(stage)

        try:
            metrics = self.local.step_unchecked(params, divisor, meet)
            self._agreement.meet("stepped", undone=False)
        except BaseException:
            self.local.optimizer.half_stepped = "clipped" in reached  # on some rank, and so for all
            raise
        return metrics

    def clear(self) -> None:
        self.local.clear()

    def gradients(self) -> Mapping[str, Tensor]:
        with self._agreement.operation("gradients"):
            held = self.local.gradients()
            self._agreement.meet("set of gradients", " ".join(held).encode())
            return {name: full(gradient) for name, gradient in held.items()}

    def plan(self, call: PreparedCall) -> Plan:
        keeps = call.registered is None or call.gradient_kind == "batch"
        share = self._schedule.datums(call) if keeps else self._schedule.units(call)
        return plan_rank(self.local.plan(call), call, share, self.local, self._shards.reshard)

    def reference(self) -> Scorer:
        frozen = self._reference
        if frozen is not None:
            return lambda call: self._score(frozen.model, frozen, call)
        base_only = self.local.base_only()

        def score_base(call: PreparedCall) -> list[Tensor]:
            with self._shards.keeping_trained(), base_only():
                return self._score(self.local.model, self._shards, call)

        return score_base

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> list[Rollout]:
        """Every rank draws all of them, from generators in the same state."""
        given = [*(prompt.tokens for prompt in prompts), self.local.generator.get_state()]
        self._agreement.meet("list of prompts", tensor_digest(given), text=f"{n} each, {params}")
        self._gather(self._shards)
        return self.local.sample(prompts, n, params)

    def save(self, name: str, overwrite: bool, ledger: Ledger) -> str:
        return self._saved(self.local.directory, name, overwrite, ledger, everything=True)

    def save_weights(self, root: Path, name: str, overwrite: bool, ledger: Ledger) -> str:
        """Write the weights alone into a folder below ``root``; return the folder."""
        return self._saved(root, name, overwrite, ledger, everything=False)

    def export(self, write: Callable[[], str]) -> str:
        """Refuse: only one process has whole weights to write."""
        raise UnsupportedError(
            "a model is exported from one process: save_state here (which writes an adapter in PEFT's format), and in a "
            "script without torchrun load_state and export"
        )

    def load(self, path: str, everything: bool) -> Ledger:
        self._agreement.meet("checkpoint", text=f"{path} {everything}")
        self._shards.release()
        ledger = load_sharded(self.local, self._files, Path(path), everything=everything)
        self.local.weights = object()
        return ledger

    def snapshot(self, weights: bool) -> Callable[[], None]:
        restore = self.local.snapshot(weights)

        def back() -> None:
            self._shards.release()
            restore()

        return back

    def close(self) -> None:
        self._shards.release()
        self.local.close()

    def retain(self, call: PreparedCall, budget: float | None = None) -> RetainedForward:
        """Score all positions and retain the graphs of this rank's share; one beyond ``budget`` bytes will run again."""
        require_same_call(self._agreement, call, self.weights_version)

        def attempt() -> tuple[DeferredBackward, list[Tensor]]:
            share = self._schedule.datums(call)
            settings = self._settings(share)
            given = settings if budget is None else replace(settings, budget=min(budget, settings.budget))
            graphs = DeferredBackward(self.local.model, given)
            with self._shards.resetting():
                self._gather(self._shards)
                scored = self._forward(graphs, share, call)
            return graphs, share.gather(scored, call, self._shards.dtype)

        graphs, logprobs = self._retried(call, attempt)
        return RetainedForward(call.requests, graphs, logprobs, self.weights_version, self.local.weights)

    def accumulate_retained(
        self,
        call: PreparedCall,
        retained: Mapping[RetainedForward, Sequence[int]],
        prepare: Callable[[list[int]], PreparedCall],
    ) -> Gradient:
        """Add the gradient of a loss on forwards that were retained; see `NativeEngine.accumulate_retained`."""
        rest = self.local.not_retained(call, retained)
        require_same_call(self._agreement, call, self.weights_version)

        def add() -> Gradient:
            places = {**retained, **({self.retain(prepare(rest)): rest} if rest else {})}
            scored = {i: x for forward, at in places.items() for i, x in zip(at, forward.logprobs, strict=True)}
            cotangents = agreed_cotangents(
                self._agreement, self._ranks, call, [scored[i] for i in range(len(call.data))]
            )
            scale = GradientScale(self.local.parameters.values(), needed=False)
            self._act("backward", lambda: backward_retained(places, cotangents.by_datum, scale))
            graphs = gather_metrics(self._ranks, [forward.graphs.metrics() for forward in places])
            counted = reuse(places, sum(forward.tokens for forward in retained))
            return summary(call, [cotangents], scored, [graphs, counted])

        return self._added(add)

    def _saved(self, root: Path, name: str, overwrite: bool, ledger: Ledger, everything: bool) -> str:
        self._agreement.meet("checkpoint", text=f"{root / name} {overwrite}")
        self._shards.release()
        return save_sharded(self.local, self._files, root, name, overwrite, ledger, everything=everything)

    def _retried(self, call: PreparedCall, attempt: Callable[[], T]) -> T:
        return self.local.memory.retry(attempt, call.lengths)

    def _score(self, model: CausalLM, shards: Shards, call: PreparedCall) -> list[Tensor]:
        require_same_call(self._agreement, call, self.weights_version)

        def attempt() -> list[Tensor]:
            share = self._schedule.datums(call)
            with shards.resetting(), torch.no_grad():
                self._gather(shards)
                own = self._act("forward", lambda: score_forwards(model, share.forwards))
            return share.gather(own, call, shards.dtype)

        return self._retried(call, attempt)

    def _added(self, add: Callable[[], Gradient]) -> Gradient:
        """Run a gradient operation into fresh gradients; after a failure those of earlier ones are as they were."""
        with self.local.accumulator.adding(), self._shards.resetting():
            self._gather(self._shards)
            with torch.enable_grad():
                gradient = add()
            with self._agreement.together("sum of the gradients"):
                self._shards.reduce()
            self._require_finite("the sum over all processes of what is finite on each")
        return gradient

    def _stream(self, call: PreparedCall) -> Gradient:
        """Let each rank stream its own units, forward, loss and backward."""
        share = self._schedule.units(call)
        scale = GradientScale(self.local.parameters.values(), needed=False)
        settings = self._settings(share)

        def work() -> Streamed:
            return streamed(self.local.model, call, share.batches, settings, scale, self._guard)

        done = self._act("gradient", work, lambda _: self._require_finite_here(call, share))
        logprobs = share.gather(done.logprobs, call, self._shards.dtype)
        own = {i: c for part in done.parts for i, c in part.by_datum.items()}
        cotangents = dict(enumerate(share.gather(own, call, self._shards.dtype)))
        everything = self._agreement.attempt("loss", lambda: evaluate(call, dict(enumerate(logprobs))))
        merged = replace(everything, by_datum=cotangents)
        none = DeferredBackward(self.local.model, settings).metrics()  # a rank without a datum has these
        graphs = gather_metrics(self._ranks, [none, *done.graph_metrics])
        return summary(call, [merged], dict(enumerate(logprobs)), [graphs])

    def _function(self, call: PreparedCall) -> Gradient:
        """Score everything, evaluate the function on all log-probs on each rank, and go back with rank 0's cotangents."""
        share = self._schedule.datums(call)
        graphs = DeferredBackward(self.local.model, self._settings(share))

        scored = share.gather(self._forward(graphs, share, call), call, self._shards.dtype)
        cotangents = agreed_cotangents(self._agreement, self._ranks, call, scored)
        self._gather(self._shards)  # where the function has asked for a forward that failed, they are no longer whole
        self._act(
            "backward", lambda: graphs.backward(cotangents.by_datum), lambda _: self._require_finite_here(call, share)
        )
        metrics = gather_metrics(self._ranks, [graphs.metrics()])
        return summary(call, [cotangents], dict(enumerate(scored)), [metrics])

    def _forward(self, graphs: DeferredBackward, share: Share, call: PreparedCall) -> dict[int, Tensor]:
        """Score this rank's datums and retain their graphs."""

        def work() -> dict[int, Tensor]:
            for batch in share.forwards:
                graphs.add(batch)
            return {i: x.cpu() for i, x in graphs.logprobs().items()}

        with torch.enable_grad():
            return self._act("forward", work, lambda scored: require_finite_logprobs(scored, call.requests))

    def _require_finite_here(self, call: PreparedCall, share: Share) -> None:
        """Check this rank's own gradients before they are added up, while it can still be said which datum is to blame."""
        if not self._shards.reshard:
            Accumulator(trainable(self.local.module)).require_finite(lambda: self.local.blame(call.requests, share.own))

    def _require_finite(self, cause: str) -> None:
        """Check the gradients of all ranks."""
        require_finite_gradients(self._ranks, self.local.gradients(), cause)

    def _gather(self, shards: Shards) -> None:
        with self._agreement.together("gathering of weights"):
            shards.gather()

    def _act(self, stage: str, work: Callable[[], T], check: Callable[[T], None] = lambda done: None) -> T:
        """Run forwards or backwards, in whose layers ranks wait for each other if these are resharded; then check."""

        def checked(done: T) -> T:
            check(done)
            return done

        if not self._shards.reshard:
            return self._agreement.attempt(stage, lambda: checked(work()))
        with self._agreement.together(stage):
            done = work()
        return self._agreement.attempt(stage, lambda: checked(done))

    def _guard(self, work: Callable[[], T]) -> T:
        """Evaluate a loss between a forward and a backward of layers that are resharded: ranks meet after it."""
        return self._agreement.attempt("loss", work) if self._shards.reshard else work()

    def _settings(self, share: Share) -> GraphSettings:
        return share.settings(self.local.memory)
