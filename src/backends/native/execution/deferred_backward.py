"""Forwards whose cotangents come later: graphs are retained as far as the memory budget goes, the rest run again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ....errors import BackendError
from ....losses.evaluation.metrics import Metric
from ....ops.logprobs import logprob_surrogate
from ..causal_lm import CausalLM
from .batching import MicroBatch
from .forward import batch_hidden, batch_logprobs, keep_in_evaluation
from .memory import GraphSettings

__all__ = ["DeferredBackward"]

_SAME = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
}  # two runs of one forward; parallel sums may differ in their last bits
_SAME_HALF = 2e-2


@dataclass(eq=False)
class _Forward:
    """One micro-batch: the graph of its base model (None: to be run again) and its size, and the head's graph."""

    batch: MicroBatch
    hidden: Tensor | None
    graph_bytes: int
    leaf: Tensor
    logprobs: Tensor


@final
class DeferredBackward:
    """Runs forwards now and their backwards later, when the cotangents are known.

    The graph is cut at the hidden states. The head's side is small (see `selected_logprobs`) and always retained, so a
    micro-batch beyond the budget runs only its base model a second time.

    Attributes:
        served: a backward has begun, of which there is one.
    """

    def __init__(self, model: CausalLM, settings: GraphSettings) -> None:
        self._model, self._settings = model, settings
        self._forwards: list[_Forward] = []
        self.served = False
        self._peak = 0.0
        self._recomputed = 0

    def add(self, batch: MicroBatch) -> None:
        """Score a micro-batch, and retain its graph if the budget allows."""
        # One graph at a time is needed in any case.
        own = self._settings.predict(batch)
        over = self.graph_bytes > 0 and self.graph_bytes + own > self._settings.budget
        keep = not over or self._settings.overflow == "offload"
        hidden, size = self._hidden(batch, keep=keep, offload=over)
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logprobs = batch_logprobs(self._model, leaf, batch)
        self._recomputed += 0 if keep else batch.tokens
        self._forwards.append(_Forward(batch, hidden if keep else None, size, leaf, logprobs))

    def logprobs(self) -> dict[int, Tensor]:
        """Return the detached log-probs of every datum, on the model's device."""
        scored = [forward for forward in self._forwards if not forward.batch.stands_for_none]
        apart = [forward.batch.apart(forward.logprobs.detach()) for forward in scored]
        return {i: logprobs for each in apart for i, logprobs in each.items()}

    def backward(self, cotangents: Mapping[int, Tensor], scale: float = 1.0) -> None:
        """Take the cotangents, times ``scale``, back into ``parameter.grad``, retained graphs first; forget everything."""
        self.served = True
        keep_in_evaluation(self._model)  # the loss may have left it, and what is checkpointed or was dropped runs again
        waiting, self._forwards = sorted(self._forwards, key=lambda f: f.hidden is not None), []
        while waiting:  # each graph is freed once it has served; after a failure none is left that could serve twice
            forward = waiting.pop()
            cotangent = torch.zeros_like(forward.logprobs)
            if not forward.batch.stands_for_none:
                cotangent = scale * torch.cat([cotangents[i] for i in forward.batch.members]).to(forward.logprobs)
            with self._backward_of(forward.batch):
                self._back(forward, cotangent)

    def one_pass(self, batch: MicroBatch, cotangent: Tensor | Callable[[Tensor, slice], Tensor]) -> dict[int, Tensor]:
        """Score and go backward at once, for a loss whose cotangent at a token needs at most that token's log-prob.

        Args:
            batch: the micro-batch; one target a position.
            cotangent: of its needed positions, [M], or a function of the log-probs of some of them and their place.

        Returns:
            Log-probs by datum.
        """
        hidden, _ = self._hidden(batch, keep=True, offload=False)
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            surrogate, logprobs = logprob_surrogate(
                leaf, self._model.head(), batch.index.targets, cotangent, temperature=batch.temperature
            )
        with self._backward_of(batch):
            torch.autograd.backward(surrogate)
            if hidden.requires_grad:
                torch.autograd.backward(hidden, leaf.grad)
        return {} if batch.stands_for_none else batch.apart(batch.index.scatter(logprobs))

    def metrics(self) -> dict[str, Metric]:
        """What happened: the largest sum of graphs retained, and the tokens that ran twice."""
        return {
            "graph_bytes": Metric(self._peak, 1.0, "max"),
            "recomputed_tokens": Metric(float(self._recomputed), 1.0, "sum"),
        }

    @property
    def exact(self) -> bool:
        """Whether log-probs are fp64."""
        return self._model.head().weight.dtype == torch.float64

    @property
    def graph_bytes(self) -> int:
        """That the graphs hold now."""
        return sum(f.graph_bytes for f in self._forwards)

    def _backward_of(self, batch: MicroBatch) -> AbstractContextManager[None]:
        return self._settings.standing_in() if batch.stands_for_none else nullcontext()

    def _back(self, forward: _Forward, cotangent: Tensor) -> None:
        """Take the cotangent of one forward back through the head, then through the base model."""
        torch.autograd.backward(forward.logprobs, cotangent)
        hidden = forward.hidden
        if hidden is None:
            hidden, _ = self._hidden(forward.batch, keep=True, offload=False)
            _require_same(hidden.detach(), forward.leaf.detach())
        if hidden.requires_grad:
            torch.autograd.backward(hidden, forward.leaf.grad)

    def _hidden(self, batch: MicroBatch, *, keep: bool, offload: bool) -> tuple[Tensor, int]:
        """Return the needed hidden states and the bytes that their graph holds on the model's device."""
        if not keep:
            with torch.no_grad():
                return batch_hidden(self._model, batch), 0
        if offload:
            with torch.enable_grad(), torch.autograd.graph.save_on_cpu():
                return batch_hidden(self._model, batch), 0
        meter = self._settings.meter
        agreed = self._settings.bytes_per_token is not None  # what one process measures may not decide what all retain
        with torch.enable_grad(), nullcontext() if agreed else meter.measuring(batch.tokens):
            hidden = batch_hidden(self._model, batch)
        size = math.ceil(self._settings.predict(batch)) if agreed else meter.bytes
        self._peak = max(self._peak, self.graph_bytes + size)
        return hidden, size


def _require_same(after: Tensor, before: Tensor) -> None:
    difference = float((after - before).norm() / before.norm().clamp(min=1e-30))
    if not difference <= _SAME.get(before.dtype, _SAME_HALF):
        raise BackendError(
            f"the model gives other hidden states when it runs a second time (relative difference {difference:.2g}), so a "
            "micro-batch beyond activation_budget cannot run again; does it draw random numbers in evaluation mode, "
            "too? Raise activation_budget"
        )
