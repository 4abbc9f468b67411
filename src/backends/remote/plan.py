"""Which way a loss would go at a service, and what it would cost there; nothing is sent."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError
from ..prepared import PreparedCall
from ..types import Plan
from .accumulator import RemoteAccumulator

__all__ = ["plan_remote"]


def plan_remote(accumulator: RemoteAccumulator, call: PreparedCall) -> Plan:
    """Plan a gradient call as the next operation.

    Args:
        accumulator: what has been sent, and what the service can do.
        call: the call.
    """
    tokens = sum(len(datum.model_input) for datum in call.data)
    cost: dict[str, Any] = {"tokens": tokens, "scored": tokens}
    try:
        accumulator.denominator(call)
    except UnsupportedError as error:
        return Plan("refuse", str(error))
    if accumulator.by_name(call):
        return Plan("native", f"the service computes {call.name} by name: one forward and one backward there", **cost)
    way = "forward there, the loss here, its cotangent back as the weights of a cross-entropy"
    if accumulator.capabilities.keeps_graphs and not accumulator.deferred:
        return Plan("single_pass", f"{way}; the service keeps the forward's graph for it", **cost)
    why = "held until optim_step" if accumulator.deferred else "the service runs the forward twice"
    return Plan("two_passes", f"{way}; {why}", recomputed=tokens, **cost)
