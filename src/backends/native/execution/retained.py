"""Forwards that wait for a cotangent from elsewhere, and the gradient of a loss on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ....errors import BackendError
from ....losses.evaluation.metrics import Metric, read, total
from ...calls.cotangents import evaluate
from ...calls.prepared import PreparedCall
from ...calls.requests import ScoreRequest
from ...engine import Gradient
from .deferred_backward import DeferredBackward
from .gradient import require_finite_logprobs, summary
from .scaling import GradientScale

__all__ = ["RetainedForward", "backward_retained", "retained_gradient", "reuse"]


@final
@dataclass(frozen=True, eq=False)
class RetainedForward:
    """One forward whose graphs wait for a cotangent from elsewhere; they serve one backward.

    Attributes:
        requests: what was scored.
        graphs: the forwards that wait.
        logprobs: one tensor per datum, detached, on the CPU.
        weights_version: optimizer steps that the weights had seen.
        weights: stands for the weights that it belongs to.
        fp16: its activations are.
    """

    requests: Sequence[ScoreRequest]
    graphs: DeferredBackward
    logprobs: Sequence[Tensor]
    weights_version: int
    weights: object
    fp16: bool = False

    @property
    def tokens(self) -> int:
        """That went through the model."""
        return sum(r.length for r in self.requests)

    @property
    def spent(self) -> bool:
        """Whether it has served; one of several processes may have no datum of it, and so nothing that waits."""
        return self.graphs.served

    @property
    def bytes(self) -> int:
        """That the graphs hold."""
        return self.graphs.graph_bytes

    def require_same(self, requests: Sequence[ScoreRequest]) -> None:
        """Check that these datums are the ones that were scored.

        Raises:
            BackendError: one has other tokens, targets or another temperature.
        """
        pairs = list(zip(self.requests, requests, strict=False))
        same = [
            torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.temperature == b.temperature
            for a, b in pairs
        ]
        if len(self.requests) != len(requests) or not all(same):
            raise BackendError("a retained forward serves the datums that it scored, all of them; these are others")


def retained_gradient(
    call: PreparedCall, places: Mapping[RetainedForward, Sequence[int]], reused: int, scale: GradientScale
) -> Gradient:
    """Evaluate a loss on log-probs that are there already, and take its cotangents back through their graphs.

    Args:
        call: the call.
        places: which datum of the call each of a forward's is; together every one, once.
        reused: tokens whose forward was made by an earlier call.
        scale: of the cotangents; gradients are to be divided by it.
    """
    logprobs = {i: x for retained, at in places.items() for i, x in zip(at, retained.logprobs, strict=True)}
    require_finite_logprobs(logprobs, call.requests)
    cotangents = evaluate(call, logprobs)
    backward_retained(places, cotangents.by_datum, scale)
    return summary(call, [cotangents], logprobs, [*(r.graphs.metrics() for r in places), reuse(places, reused)])


def backward_retained(
    places: Mapping[RetainedForward, Sequence[int]],
    cotangents: Mapping[int, Tensor],
    scale: GradientScale,
) -> None:
    """Take the cotangents of a call's datums back through the forwards that scored them."""
    for retained, at in places.items():
        own = {local: cotangents[i] for local, i in enumerate(at)}
        retained.graphs.backward(own, scale.choose(cotangents))


def reuse(places: Mapping[RetainedForward, Sequence[int]], reused: int) -> Mapping[str, Metric]:
    """Return how many tokens' forwards were there already, and how many were made for this call."""
    tokens = sum(retained.tokens for retained in places)
    return read({"reused_tokens": total(float(reused)), "forward_tokens": total(float(tokens - reused))})
