"""What a call will cost, and the layout that costs least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from torch import nn

from ....ops.head import Head
from ...types import Plan
from .batching import Layout, ScoreRequest, micro_batches, own_lengths, padded_tokens

__all__ = ["Model", "Route", "choose_layout", "describe_model", "make_plan"]


@final
@dataclass(frozen=True)
class Model:
    """The sizes that cost is made of.

    Attributes:
        trunk: parameters that multiply every token (embeddings and head left out).
        trained: trainable parameters.
        hidden, vocab: size of the head.
        pair_flops: FLOPs of attention per pair of tokens, all layers.
        frozen_head: True if the head has no gradient.
        item_bytes: bytes of a trainable parameter.
        segments: packed sequences attend by themselves, not under a mask over all tokens.
    """

    trunk: int
    trained: int
    hidden: int
    vocab: int
    pair_flops: float
    frozen_head: bool
    item_bytes: int
    segments: bool


def describe_model(module: nn.Module, head: Head, pair_flops: float) -> Model:
    """Measure a model: every matrix outside embeddings and head multiplies every token."""
    vocab, hidden = head.weight.shape
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in module.parameters() if p.dim() >= 2 and p is not head.weight and id(p) not in embeddings]
    trained = [p for p in module.parameters() if p.requires_grad]
    return Model(
        trunk=sum(p.numel() for p in matrices),
        trained=sum(p.numel() for p in trained),
        hidden=hidden,
        vocab=vocab,
        pair_flops=pair_flops,
        frozen_head=not head.weight.requires_grad,
        item_bytes=max((p.element_size() for p in trained), default=4),
        segments=bool(getattr(module, "attends_by_segment", False)),
    )


def choose_layout(model: Model, allowed: Sequence[Layout], requests: Sequence[ScoreRequest], budget: int) -> Layout:
    """Return the allowed layout with the fewest FLOPs: padding wastes tokens, packing wastes attention."""
    ranked = [layout for layout in allowed if layout != "single"]
    if not ranked:
        return "single"
    lengths, units = [r.length for r in requests], [[i] for i in range(len(requests))]

    def cost(layout: Layout) -> float:
        batches = micro_batches(units, lengths, budget, layout)
        return sum(sum(_trunk_flops(model, [requests[i] for i in batch], layout)) for batch in batches)

    return min(ranked, key=cost)


@final
@dataclass(frozen=True)
class Route:
    """How a call will run.

    Attributes:
        name, reason: as in `Plan`.
        keeps: all graphs wait for the loss (a function); else one micro-batch's at a time.
        known: a trained head pulls back in the pass that scores.
        budget: bytes for graphs.
        bytes_per_token: of a graph.
    """

    name: str
    reason: str
    keeps: bool
    known: bool
    budget: float
    bytes_per_token: float


def make_plan(
    model: Model, route: Route, layout: Layout, requests: Sequence[ScoreRequest], batches: list[list[int]]
) -> Plan:
    """Predict tokens, FLOPs and memory of a call from its micro-batches."""
    groups = [[requests[i] for i in batch] for batch in batches]
    own = [sum(own_lengths(group, layout)) for group in groups]
    scored = [sum(int(requests[i].needed.sum()) for i in batch) for batch in batches]
    sizes = [n * route.bytes_per_token for n in own]
    again = _recomputed(sizes, route.budget) if route.keeps else []
    kept = sum(size for i, size in enumerate(sizes) if i not in again)
    graphs = max([kept, *(sizes[i] for i in again)]) if route.keeps else max(sizes)
    trunk = [_trunk_flops(model, group, layout) for group in groups]
    head = 2.0 * model.hidden * model.vocab * sum(scored)
    # A frozen matrix needs one product in the backward (for its input), a trained one two; fused attention five for two.
    linear, attention = (1.0 if model.trained < model.trunk / 2 else 2.0), (2.5 if model.segments else 2.0)
    backward = sum(linear * t.linear + attention * t.attention for t in trunk)
    at_once = sum(scored) if route.keeps else max(scored)
    found = f"; {len(again)} of {len(batches)} micro-batches run twice" if again else ""
    return Plan(
        route="two_passes" if again else route.name,
        reason=route.reason + found,
        micro_batches=batches,
        layout=layout,
        tokens=sum(_tokens(group, layout) for group in groups),
        scored=sum(scored),
        recomputed=sum(own[i] for i in again),
        forward_flops=sum(map(sum, trunk)) + head,
        backward_flops=backward + head * _head_products(model, route) + sum(sum(trunk[i]) for i in again),
        graph_bytes=graphs,
        peak_bytes=graphs + 4.0 * model.hidden * at_once + float(model.trained * model.item_bytes),
    )


def _recomputed(sizes: Sequence[float], budget: float) -> list[int]:
    """Return the micro-batches whose graphs do not fit, in the order in which they come."""
    held, again = 0.0, []
    for i, size in enumerate(sizes):
        if held > 0 and held + size > budget:
            again.append(i)
        else:
            held += size
    return again


def _head_products(model: Model, route: Route) -> float:
    """Products of the head beside the scores: of its input; trained, of the weight; late, of the scores again."""
    return 1.0 if model.frozen_head else 2.0 if route.known else 3.0


def _tokens(requests: Sequence[ScoreRequest], layout: Layout) -> int:
    return padded_tokens([r.length for r in requests]) if layout == "padded" else sum(own_lengths(requests, layout))


class _Trunk(NamedTuple):
    """FLOPs of a trunk's forward."""

    linear: float
    attention: float


def _trunk_flops(model: Model, requests: Sequence[ScoreRequest], layout: Layout) -> _Trunk:
    tokens, lengths = _tokens(requests, layout), [r.length for r in requests]
    match layout:
        case "packed" | "forked" if not model.segments:
            pairs = float(tokens) ** 2
        case "padded":
            pairs = float(tokens) * max(lengths)
        case _:
            pairs = float(sum(own * n for own, n in zip(own_lengths(requests, layout), lengths, strict=True)))
    return _Trunk(2.0 * model.trunk * tokens, model.pair_flops * pairs)
