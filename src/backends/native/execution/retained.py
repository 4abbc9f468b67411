"""Forwards that wait for a cotangent from elsewhere: a client computes the loss while the graphs are kept here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ....datums.types import Datum
from ....errors import BackendError
from ....losses.base import Loss
from ....losses.metrics import combine_metrics, total
from .batching import ScoreRequest
from .deferred_backward import Tape
from .gradient import Gradient, evaluate, require_finite_cotangents, require_finite_logprobs, summary

__all__ = ["HeldForward", "held_gradient"]


@final
@dataclass(frozen=True, eq=False)
class HeldForward:
    """The graphs of one forward; they serve one backward.

    Attributes:
        requests: what was scored.
        tape: the graphs.
        logprobs: one tensor per datum, detached, on the CPU.
        weights_version: the weights that it belongs to.
    """

    requests: Sequence[ScoreRequest]
    tape: Tape
    logprobs: Sequence[Tensor]
    weights_version: int

    @property
    def tokens(self) -> int:
        """That went through the trunk."""
        return sum(r.length for r in self.requests)

    @property
    def spent(self) -> bool:
        """Whether it has served."""
        return not self.tape.forwards

    @property
    def bytes(self) -> int:
        """That the graphs hold."""
        return self.tape.held_bytes

    def require_same(self, requests: Sequence[ScoreRequest]) -> None:
        """Check that these datums are the ones that were scored.

        Raises:
            BackendError: one has other tokens or targets.
        """
        pairs = list(zip(self.requests, requests, strict=False))
        same = [torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) for a, b in pairs]
        if len(self.requests) != len(requests) or not all(same):
            raise BackendError("a held forward serves the datums that it scored, all of them; these are others")


def held_gradient(
    loss: Loss, data: Sequence[Datum], places: Mapping[HeldForward, Sequence[int]], reused: int
) -> Gradient:
    """Evaluate a loss on log-probs that are there already, and pull its cotangent back through their graphs.

    Args:
        loss: any registered loss.
        data: all datums of the call.
        places: which datum of ``data`` each of a forward's is; together every one, once.
        reused: tokens whose forward was made by an earlier call.
    """
    logprobs = {i: x for held, at in places.items() for i, x in zip(at, held.logprobs, strict=True)}
    requests = {i: r for held, at in places.items() for i, r in zip(at, held.requests, strict=True)}
    ordered = [requests[i] for i in range(len(data))]
    require_finite_logprobs(logprobs, ordered)
    done = evaluate(loss, dict(enumerate(data)), logprobs, None)
    require_finite_cotangents(done.cotangents, ordered, loss.name)
    for held, at in places.items():
        held.tape.backward({local: done.cotangents[i] for local, i in enumerate(at)})
    tokens = sum(held.tokens for held in places)
    own = {"reused_tokens": total(float(reused)), "forward_tokens": total(float(tokens - reused))}
    memory = combine_metrics([held.tape.metrics() for held in places])
    done = done._replace(metrics={**done.metrics, **memory, **own})
    return summary([done], [logprobs[i] for i in range(len(data))])
