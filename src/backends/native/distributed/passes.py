"""The forwards and backwards of a call: each rank runs its share of them, and all meet before anything is added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar, final

import torch
from torch import Tensor

from ...calls.cotangents import evaluate
from ...calls.prepared import PreparedCall
from ...engine import Gradient
from ..accumulator import Accumulator
from ..engine import NativeEngine
from ..execution.deferred_backward import DeferredBackward
from ..execution.forward import trainable
from ..execution.gradient import (
    Streamed,
    require_finite_logprobs,
    streamed,
    summary,
)
from ..execution.memory import GraphSettings
from ..execution.scaling import GradientScale
from .agreement.agreement import Agreement
from .agreement.exchange import agreed_cotangents, gather_metrics, require_one_loss
from .ranks import Ranks
from .schedule import Schedule, Share
from .sharding import Shards

__all__ = ["Passes"]

T = TypeVar("T")


@final
class Passes:
    """Runs passes through a sharded model.

    Args:
        local: this process's part.
        shards: its model's.
        ranks: the processes.
        agreement: of them.
        schedule: deals out what they do.
    """

    def __init__(
        self, local: NativeEngine, shards: Shards, ranks: Ranks, agreement: Agreement, schedule: Schedule
    ) -> None:
        self._local, self._shards, self._ranks, self._agreement = local, shards, ranks, agreement
        self._schedule = schedule

    def stream(self, call: PreparedCall) -> Gradient:
        """Let each rank stream its own units, forward, loss and backward."""
        share = self.dealt(self._schedule.units, call)
        scale = GradientScale(self._local.parameters.values(), needed=False)
        settings = self.settings(share)

        def work() -> Streamed:
            return streamed(self._local.model, call, share.batches, settings, scale, self._run_loss)

        done = self.act("gradient", work, lambda _: self._require_finite_here(call, share.own))
        logprobs = share.gather(done.logprobs, call, self._shards.dtype)
        own = {i: c for part in done.parts for i, c in part.by_datum.items()}
        cotangents = dict(enumerate(share.gather(own, call, self._shards.dtype)))
        everything = self._agreement.attempt("loss", lambda: evaluate(call, dict(enumerate(logprobs))))
        self._agreement.attempt("cotangents", lambda: require_one_loss(call.name, everything.by_datum, cotangents))
        merged = replace(everything, by_datum=cotangents)
        none = DeferredBackward(self._local.model, settings).metrics()  # a rank without a datum has these
        graphs = gather_metrics(self._ranks, [none, *done.graph_metrics])
        return summary(call, [merged], dict(enumerate(logprobs)), [graphs])

    def function(self, call: PreparedCall) -> Gradient:
        """Score everything, evaluate the function on all log-probs on each rank, and go back with rank 0's cotangents."""
        share = self.dealt(self._schedule.datums, call)
        graphs = DeferredBackward(self._local.model, self.settings(share))

        scored = share.gather(self.forward(graphs, share, call), call, self._shards.dtype)
        cotangents = agreed_cotangents(self._agreement, self._ranks, call, scored)
        self.gather(self._shards)  # where the function has asked for a forward that failed, they are no longer whole
        self.back(call, lambda: graphs.backward(cotangents.by_datum), share.own)
        metrics = gather_metrics(self._ranks, [graphs.metrics()])
        return summary(call, [cotangents], dict(enumerate(scored)), [metrics])

    def forward(self, graphs: DeferredBackward, share: Share, call: PreparedCall) -> dict[int, Tensor]:
        """Score this rank's datums and retain their graphs."""

        def work() -> dict[int, Tensor]:
            for batch in share.forwards:
                graphs.add(batch)
            return {i: x.cpu() for i, x in graphs.logprobs().items()}

        with torch.enable_grad():
            return self.act("forward", work, lambda scored: require_finite_logprobs(scored, call.requests))

    def dealt(self, deal: Callable[[PreparedCall], Share], call: PreparedCall) -> Share:
        """Deal a call out: each rank must have laid out its share before any waits for another one in a forward."""
        return self._agreement.attempt("schedule", lambda: deal(call))

    def gather(self, shards: Shards) -> None:
        """Gather the weights of a model."""
        with self._agreement.together("gathering of weights"):
            shards.gather()

    def act(self, stage: str, work: Callable[[], T], check: Callable[[T], None] = lambda done: None) -> T:
        """Run forwards or backwards, then check; if layers are resharded, or the head is cut, ranks wait inside."""

        def checked(done: T) -> T:
            check(done)
            return done

        if not self._shards.in_step:
            return self._agreement.attempt(stage, lambda: checked(work()))
        with self._agreement.together(stage):
            done = work()
        return self._agreement.attempt(stage, lambda: checked(done))

    def back(self, call: PreparedCall, work: Callable[[], None], members: Sequence[int] | None = None) -> None:
        """Run the backwards of this rank, of which these datums (default: any) may be to blame for what is not finite."""
        self.act("backward", work, lambda _: self._require_finite_here(call, members))

    def settings(self, share: Share) -> GraphSettings:
        """Return how this rank retains graphs, and how it runs forwards that only keep step with the others."""
        return replace(share.settings(self._local.memory), standing_in=self._shards.standing_in)

    def _run_loss(self, work: Callable[[], T]) -> T:
        """Evaluate a loss between a forward and a backward that all ranks run in step: they meet after it."""
        return self._agreement.attempt("loss", work) if self._shards.in_step else work()

    def _require_finite_here(self, call: PreparedCall, members: Sequence[int] | None) -> None:
        """Check this rank's own gradients before they are added up, while it can still be said which datum is to blame."""
        if not self._shards.in_step:
            Accumulator(trainable(self._local.module)).require_finite(lambda: self._local.blame(call.requests, members))
