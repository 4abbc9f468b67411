"""Forwards that wait for their cotangents: graphs are kept as far as the activation budget goes, the rest run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from ....errors import BackendError
from ....losses.metrics import Metric, total
from ....ops.logprobs import logprob_surrogate, selected_logprobs
from ..causal_lm import CausalLM
from .batching import Layout, ScoreRequest, own_lengths
from .forward import Wanted, model_device, needed_hidden
from .memory import GraphMeter

__all__ = ["Overflow", "Tape", "TapeSettings"]

Overflow = Literal["recompute", "offload"]
_SAME = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
}  # two runs of one forward; parallel sums may differ in their last bits
_SAME_HALF = 2e-2


@final
@dataclass(frozen=True, eq=False)
class TapeSettings:
    """How forwards are kept.

    Attributes:
        layout: of a micro-batch's rows.
        budget: bytes that the graphs may hold together.
        overflow: what happens to those beyond: run again before their backward, or moved to CPU memory.
        meter: measures them.
    """

    layout: Layout
    budget: float
    overflow: Overflow
    meter: GraphMeter


@dataclass(eq=False)
class _Forward:
    """One micro-batch: datum indices, its trunk's graph (None: to be run again) and size, and its head's."""

    batch: Sequence[int]
    requests: Sequence[ScoreRequest]
    hidden: Tensor | None
    held: int
    leaf: Tensor
    logprobs: Tensor


@final
class Tape:
    """Runs forwards now and their backwards later, when the cotangents are known.

    The graph is cut at the hidden states. The head's side is small (see `selected_logprobs`) and always kept, so a
    micro-batch beyond the budget runs only its trunk a second time.
    """

    def __init__(self, model: CausalLM, settings: TapeSettings) -> None:
        self._model, self._settings = model, settings
        self._forwards: list[_Forward] = []
        self._peak = 0.0
        self._recomputed = 0

    def add(self, batch: Sequence[int], requests: Sequence[ScoreRequest]) -> None:
        """Score a micro-batch, and keep its graph if the budget allows."""
        tokens = sum(own_lengths(requests, self._settings.layout))
        # One graph at a time is needed in any case.
        over = self.held_bytes > 0 and self.held_bytes + self._settings.meter.predict(tokens) > self._settings.budget
        keep = not over or self._settings.overflow == "offload"
        hidden, held = self._trunk(requests, keep=keep, offload=over)
        leaf = hidden.detach().requires_grad_()
        wanted = Wanted.of(requests, model_device(self._model))
        with torch.enable_grad():
            logprobs = wanted.spread(selected_logprobs(leaf, self._model.head(), wanted.targets))
        self._recomputed += 0 if keep else tokens
        self._forwards.append(_Forward(batch, requests, hidden if keep else None, held, leaf, logprobs))

    def logprobs(self) -> dict[int, Tensor]:
        """Return the detached log-probs of every datum, on the model's device."""
        found: dict[int, Tensor] = {}
        for one in self._forwards:
            pieces = torch.split(one.logprobs.detach(), [r.length for r in one.requests])
            found |= dict(zip(one.batch, pieces, strict=True))
        return found

    def backward(self, cotangents: Mapping[int, Tensor]) -> None:
        """Pull the cotangents back into ``parameter.grad``, kept graphs first, and forget everything."""
        for one in sorted(self._forwards, key=lambda f: f.hidden is None):
            given = torch.cat([cotangents[i] for i in one.batch]).to(one.logprobs)
            torch.autograd.backward(one.logprobs, given)
            hidden = one.hidden
            if hidden is None:
                hidden, _ = self._trunk(one.requests, keep=True, offload=False)
                _require_same(hidden.detach(), one.leaf.detach())
            if hidden.requires_grad:
                torch.autograd.backward(hidden, one.leaf.grad)
            self._forwards.remove(one)

    def pull_known(
        self,
        batch: Sequence[int],
        requests: Sequence[ScoreRequest],
        cotangents: Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]],
        constant: bool,
    ) -> dict[int, Tensor]:
        """Score and pull back in one pass, for a loss whose cotangent at a token needs that token's log-prob at most.

        Args:
            batch, requests: the micro-batch.
            cotangents: from log-probs by datum (0.0 where they are not known yet) to their cotangents.
            constant: these do not depend on the log-probs at all.

        Returns:
            Log-probs by datum.
        """
        wanted = Wanted.of(requests, model_device(self._model))
        hidden, _ = self._trunk(requests, keep=True, offload=False)
        leaf, head = hidden.detach().requires_grad_(), self._model.head()
        exact = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        whole = torch.zeros(wanted.shape, dtype=exact, device=leaf.device)
        sizes = [r.length for r in requests]

        def ask() -> Tensor:
            found = cotangents(dict(zip(batch, torch.split(whole, sizes), strict=True)))
            return torch.cat([found[i] for i in batch])[wanted.at]

        def of_chunk(logprobs: Tensor, at: slice) -> Tensor:
            whole[wanted.at[at]] = logprobs
            return ask()[at]

        with torch.enable_grad():
            surrogate, logprobs = logprob_surrogate(leaf, head, wanted.targets, ask() if constant else of_chunk)
        torch.autograd.backward(surrogate)
        if hidden.requires_grad:
            torch.autograd.backward(hidden, leaf.grad)
        return dict(zip(batch, torch.split(wanted.spread(logprobs), sizes), strict=True))

    def metrics(self) -> dict[str, Metric]:
        """What happened: the largest sum of graphs held, and the tokens that ran twice."""
        return {
            "graph_bytes": Metric(self._peak, 1.0, "max"),
            "recomputed_tokens": total(float(self._recomputed)),
        }

    @property
    def forwards(self) -> int:
        """That still wait for their cotangents."""
        return len(self._forwards)

    @property
    def held_bytes(self) -> int:
        """That the graphs hold now."""
        return sum(f.held for f in self._forwards)

    def _trunk(self, requests: Sequence[ScoreRequest], *, keep: bool, offload: bool) -> tuple[Tensor, int]:
        """Return the needed hidden states and the bytes that their graph holds on the model's device."""
        layout, meter = self._settings.layout, self._settings.meter
        if not keep:
            with torch.no_grad():
                return needed_hidden(self._model, requests, layout), 0
        if offload:
            with torch.enable_grad(), torch.autograd.graph.save_on_cpu():
                return needed_hidden(self._model, requests, layout), 0
        with torch.enable_grad(), meter.measuring(sum(own_lengths(requests, layout))):
            hidden = needed_hidden(self._model, requests, layout)
        self._peak = max(self._peak, self.held_bytes + meter.bytes)
        return hidden, meter.bytes


def _require_same(after: Tensor, before: Tensor) -> None:
    difference = float((after - before).norm() / before.norm().clamp(min=1e-30))
    if not difference <= _SAME.get(before.dtype, _SAME_HALF):
        raise BackendError(
            f"the model gives other hidden states when it runs a second time (relative difference {difference:.2g}), so a "
            "micro-batch beyond activation_budget cannot run again; is dropout on? Call model.eval(), or raise "
            "activation_budget"
        )
