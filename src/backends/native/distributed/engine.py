"""The native engine on several processes: each scores its share of a call, and all of them agree before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, final

import torch
from torch import Tensor, nn

from ....datums.types import ModelInput
from ....errors import UnsupportedError
from ...calls.prepared import PreparedCall
from ...engine import Call, Engine, Gradient, Scorer
from ...operations.normalization import Divisor, Ledger
from ...types import AdamParams, Plan, Rollout, SamplingParams
from ..causal_lm import CausalLM
from ..checkpoints.export import Export
from ..dtensors import full
from ..engine import NativeEngine
from ..execution.deferred_backward import DeferredBackward
from ..execution.forward import score_forwards
from ..execution.gradient import summary
from ..execution.retained import RetainedForward, backward_retained, reuse
from ..execution.scaling import GradientScale
from .agreement.agreement import Agreement
from .agreement.digest import tensor_digest
from .agreement.exchange import agreed_cotangents, gather_metrics, require_finite_gradients, require_same_call
from .checkpoints.export import export_sharded
from .checkpoints.files import ShardedFiles
from .checkpoints.load import load_sharded
from .checkpoints.save import save_sharded
from .passes import Passes
from .plan import plan_rank
from .ranks import Ranks
from .schedule import Schedule
from .sharding import Shards, require_no_fp16
from .trained import TrainedShards

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
        self._trained = TrainedShards(local.module, local.weights_trained, shards.rows)
        self._schedule = Schedule(local.scheduler, ranks, in_step=shards.in_step)
        self._passes = Passes(local, shards, ranks, agreement, self._schedule)

    @property
    def weights_version(self) -> int:  # type: ignore[override]  # the local engine counts
        """Optimizer steps so far."""
        return self.local.weights_version

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:  # type: ignore[override]  # one form of each is made when first gathered
        """What is trained, in every form that it has."""
        return self._trained.forms

    @contextmanager
    def operation(self, call: Call) -> Iterator[None]:
        with self._agreement.operation(call.operation), self._shards.casting_anew():
            self._trained.settle()
            self.local.begin(call)
            yield

    def score(self, call: PreparedCall) -> list[Tensor]:
        return self._score(self.local.model, self._shards, call)

    def accumulate(self, call: PreparedCall) -> Gradient:
        self._require_own()
        require_same_call(self._agreement, call, self._place)
        add = self._passes.function if call.needs_all_datums else self._passes.stream
        return self._retried(call, lambda: self._added(lambda: add(call)))

    def step(self, params: AdamParams, divisor: Divisor) -> Mapping[str, float]:
        self._require_own()
        settings = f"{params}, gradient of {self._calls} divided by {divisor.value}, at step {self.weights_version}"
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
        self._shards.forget_gradients()
        self.local.clear()

    def gradients(self) -> Mapping[str, Tensor]:
        with self._agreement.operation("gradients"):
            held = self.local.gradients()
            self._agreement.meet("set of gradients", " ".join(held).encode())
            return {name: full(gradient) for name, gradient in held.items()}

    def plan(self, call: PreparedCall) -> Plan:
        share = self._schedule.datums(call) if call.needs_all_datums else self._schedule.units(call)
        return plan_rank(self.local.plan(call), call, share, self.local, self._shards)

    def reference(self) -> Scorer:
        shards, limits = self._reference, self.local.frozen
        if shards is not None and limits is not None:

            def score_frozen(call: PreparedCall) -> list[Tensor]:
                limits.require_scorable(call)
                return self._score(shards.model, shards, call)

            return score_frozen
        base_only = self.local.base_only()

        def score_base(call: PreparedCall) -> list[Tensor]:
            with self._shards.keeping_trained(), base_only():
                return self._score(self.local.model, self._shards, call)

        return score_base

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> list[Rollout]:
        """Every rank draws all of them, from generators in the same state."""
        given = [*(prompt.tokens for prompt in prompts), self.local.generator.get_state()]
        self._agreement.meet("list of prompts", tensor_digest(given), text=f"{n} each, {params}")
        self._passes.gather(self._shards)
        with self._shards.whole_head():
            return self.local.sample(prompts, n, params)

    def save(self, name: str, overwrite: bool, ledger: Ledger) -> str:
        return self._saved(self.local.directory, name, overwrite, ledger, everything=True)

    def save_weights(self, root: Path, name: str, overwrite: bool, ledger: Ledger) -> str:
        """Write the weights alone into a folder below ``root``; return the folder."""
        return self._saved(root, name, overwrite, ledger, everything=False)

    def export(self, export: Export) -> str:
        """Write the model for others; return where."""
        self._agreement.meet("export", text=export.described)
        self._agreement.attempt("model and folder", export.check)
        self._shards.release()
        return export_sharded(export, self._files, self._agreement)

    def load(self, path: str, everything: bool) -> Ledger:
        self._agreement.meet("checkpoint", text=f"{path} {everything}")
        self._shards.release()
        return load_sharded(self.local, self._files, Path(path), everything=everything)

    def snapshot(self, weights: bool) -> Callable[[], None]:
        restore = self.local.snapshot(weights)

        def back() -> None:
            self._shards.release()
            restore()

        return back

    def close(self, timeout: float | None = None) -> None:
        self._shards.release()
        self.local.close(timeout)

    def gather(self) -> None:
        """Hold the weights whole on every rank until they change.

        Raises:
            UnsupportedError: the head is cut.
        """
        if self._shards.rows is not None:
            raise UnsupportedError(
                "the head is cut over the processes, and each has only some rows of it; make the backend with "
                "vocab_parallel=False for weights that every process holds whole"
            )
        self._agreement.meet("beginning")
        self._passes.gather(self._shards)

    def retain(self, call: PreparedCall, budget: float | None = None) -> RetainedForward:
        """Score all positions and retain the graphs of this rank's share; one beyond ``budget`` bytes will run again."""
        require_same_call(self._agreement, call, self._place)
        require_no_fp16(self.local.memory.device)

        def attempt() -> tuple[DeferredBackward, list[Tensor]]:
            with self._shards.resetting():
                share = self._passes.dealt(self._schedule.datums, call)
                settings = self._passes.settings(share)
                given = settings if budget is None else replace(settings, budget=min(budget, settings.budget))
                graphs = DeferredBackward(self.local.model, given)
                self._passes.gather(self._shards)
                scored = self._passes.forward(graphs, share, call)
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
        self._require_own()
        rest = self.local.not_retained(call, retained)
        require_same_call(self._agreement, call, self._place)

        def add() -> Gradient:
            places = {**retained, **({self.retain(prepare(rest)): rest} if rest else {})}
            scored = {i: x for forward, at in places.items() for i, x in zip(at, forward.logprobs, strict=True)}
            logprobs = [scored[i] for i in range(len(call.data))]
            cotangents = agreed_cotangents(self._agreement, self._ranks, call, logprobs)
            scale = GradientScale(self.local.parameters.values(), needed=False)
            self._passes.gather(self._shards)  # see `Passes.function`
            self._passes.back(call, lambda: backward_retained(places, cotangents.by_datum, scale))
            graphs = gather_metrics(self._ranks, [forward.graphs.metrics() for forward in places])
            return summary(call, [cotangents], scored, [graphs, reuse(places, sum(r.tokens for r in retained))])

        return self._added(add)

    def _saved(self, root: Path, name: str, overwrite: bool, ledger: Ledger, everything: bool) -> str:
        self._agreement.meet("checkpoint", text=f"{root / name} {overwrite}")
        self._shards.release()
        return save_sharded(self.local, self._files, root, name, overwrite, ledger, everything=everything)

    def _retried(self, call: PreparedCall, attempt: Callable[[], T]) -> T:
        return self.local.memory.retry(attempt, call.lengths)

    def _score(self, model: CausalLM, shards: Shards, call: PreparedCall) -> list[Tensor]:
        require_same_call(self._agreement, call, self._place)

        def attempt() -> list[Tensor]:
            with shards.resetting(), torch.no_grad():
                share = self._passes.dealt(self._schedule.datums, call)
                self._passes.gather(shards)
                own = self._passes.act("forward", lambda: score_forwards(model, share.forwards))
            return share.gather(own, call, shards.dtype)

        return self._retried(call, attempt)

    def _added(self, add: Callable[[], Gradient]) -> Gradient:
        """Run a gradient operation into fresh gradients; after a failure those of earlier ones are as they were."""
        require_no_fp16(self.local.memory.device)
        with self.local.accumulator.adding(), self._shards.resetting():
            self._passes.gather(self._shards)
            with torch.enable_grad():
                gradient = add()
            with self._agreement.together("sum of the gradients"):
                summed = self._shards.reduce(self._ranks, bool(self._trained.frozen))
            self._trained.require_summed(summed)
            self.local.accumulator.require_reached()
            self._require_finite("the sum over all processes of what is finite on each")
        return gradient

    @property
    def _calls(self) -> str:
        """How many gradients have accumulated on this rank, in words."""
        calls = self.local.accumulator.calls
        return f"{calls} call{'s' * (calls != 1)}"

    @property
    def _place(self) -> str:
        """Where this rank is, in words: the steps of the weights, and what has accumulated since."""
        return f"step {self.weights_version} after {self._calls}{self._trained.described}"

    def _require_own(self) -> None:
        """Check that this rank's gradients are those that were added here, and that it trains what it did."""
        self.local.accumulator.require_own()
        self._shards.require_own_gradients()
        self._trained.require_same()

    def _require_finite(self, cause: str) -> None:
        """Check the gradients of all ranks."""
        require_finite_gradients(self._ranks, self.local.gradients(), cause)
