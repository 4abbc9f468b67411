"""What the native backend would do with a call, why, and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from ..calls.prepared import PreparedCall
from ..calls.requests import ScoreRequest
from ..types import Plan
from .execution.batching import Layout, own_lengths
from .execution.cost_model import ModelSizes, base_flops, forward_tokens
from .execution.gradient import streams_in_one_pass
from .execution.scheduler import Scheduler

__all__ = ["plan_call", "recomputed"]


def plan_call(scheduler: Scheduler, call: PreparedCall) -> Plan:
    """Plan a gradient call; nothing runs."""
    layout, batches = scheduler.split(call, call.units)
    loss = call.registered
    if loss is None:
        reason = f"a function of all log-probs: one forward, its graphs retained; {_layout_reason(scheduler)}"
        route = _route(scheduler, "single_pass", reason, layout, True, False)
    else:
        kind = call.gradient_kind
        reason = f"{loss.name} is registered ({kind} kind): streamed by micro-batch; {_layout_reason(scheduler)}"
        one_pass = streams_in_one_pass(scheduler.model, call)
        route = _route(scheduler, "native", reason, layout, kind == "batch", one_pass)
        batches = [forward for batch in batches for forward in scheduler.forwards(call, batch, layout)]
    return _predict(scheduler.sizes, route, layout, call.requests, batches)


def _route(scheduler: Scheduler, name: str, reason: str, layout: Layout, keeps: bool, one_pass: bool) -> _Route:
    settings = scheduler.memory.settings(layout)
    budget = settings.budget if settings.overflow == "recompute" else float("inf")
    return _Route(name, reason, keeps, one_pass, budget, settings.meter.predict(1))


def _layout_reason(scheduler: Scheduler) -> str:
    if "packed" in scheduler.layouts.longest:
        return "sequences may be packed"
    return "packing is off (not allowed, or the model lets packed sequences see each other)"


@final
@dataclass(frozen=True)
class _Route:
    """How a call will run.

    Attributes:
        name, reason: as in `Plan`.
        keeps: all graphs wait for the loss (a function); otherwise one micro-batch's at a time.
        one_pass: a trained head goes backward in the pass that scores.
        budget: bytes for graphs.
        bytes_per_token: of a graph.
    """

    name: str
    reason: str
    keeps: bool
    one_pass: bool
    budget: float
    bytes_per_token: float


def _predict(
    model: ModelSizes, route: _Route, layout: Layout, requests: Sequence[ScoreRequest], batches: list[list[int]]
) -> Plan:
    """Predict tokens, FLOPs and memory of a call from its micro-batches."""
    groups = [[requests[i] for i in batch] for batch in batches]
    own = [sum(own_lengths(group, layout)) for group in groups]
    scored = [sum(int(requests[i].needed.sum()) for i in batch) for batch in batches]
    sizes = [n * route.bytes_per_token for n in own]
    again = recomputed(sizes, route.budget) if route.keeps else []
    kept = sum(size for i, size in enumerate(sizes) if i not in again)
    graphs = max([kept, *(sizes[i] for i in again)]) if route.keeps else max(sizes)
    base = [base_flops(model, group, layout) for group in groups]
    head = 2.0 * model.hidden * model.vocab * sum(scored)
    # A frozen matrix needs one product in the backward (for its input), a trained one two; fused attention five for two.
    linear, attention = (1.0 if model.trained < model.base / 2 else 2.0), (2.5 if model.segments else 2.0)
    backward = sum(linear * f.linear + attention * f.attention for f in base)
    at_once = sum(scored) if route.keeps else max(scored)
    again_words = f"; {len(again)} of {len(batches)} micro-batches run twice" if again else ""
    return Plan(
        route="two_passes" if again else route.name,
        reason=route.reason + again_words,
        micro_batches=batches,
        layout=layout,
        tokens=sum(forward_tokens(group, layout) for group in groups),
        scored=sum(scored),
        recomputed=sum(own[i] for i in again),
        forward_flops=sum(map(sum, base)) + head,
        backward_flops=backward + head * _head_products(model, route) + sum(sum(base[i]) for i in again),
        graph_bytes=graphs,
        peak_bytes=graphs + 4.0 * model.hidden * at_once + float(model.trained * model.item_bytes),
    )


def recomputed(sizes: Sequence[float], budget: float) -> list[int]:
    """Return the micro-batches whose graphs do not fit, in the order in which they come."""
    held, again = 0.0, []
    for i, size in enumerate(sizes):
        if held > 0 and held + size > budget:
            again.append(i)
        else:
            held += size
    return again


def _head_products(model: ModelSizes, route: _Route) -> float:
    """Products of the head beside the scores: of its input; trained, of the weight; recomputed, of the scores again."""
    return 1.0 if model.frozen_head else 2.0 if route.one_pass else 3.0
