"""What a call will cost, and the layout that costs least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from ..types import Plan
from .adapter import Head
from .batching import Layout, ScoreRequest, micro_batches, padded_tokens

__all__ = ["Model", "choose_layout", "describe_model", "make_plan"]


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
    """

    trunk: int
    trained: int
    hidden: int
    vocab: int
    pair_flops: float
    frozen_head: bool
    item_bytes: int


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
    )


def choose_layout(model: Model, allowed: Sequence[Layout], lengths: Sequence[int], budget: int) -> Layout:
    """Return the allowed layout with the fewest FLOPs: padding wastes tokens, packing wastes attention."""
    ranked = [layout for layout in allowed if layout != "single"]
    if not ranked:
        return "single"
    units = [[i] for i in range(len(lengths))]

    def cost(layout: Layout) -> float:
        batches = micro_batches(units, lengths, budget, layout)
        return sum(_forward_flops(model, [lengths[i] for i in batch], layout, 0) for batch in batches)

    return min(ranked, key=cost)


def make_plan(
    model: Model, route: str, reason: str, layout: Layout, requests: Sequence[ScoreRequest], batches: list[list[int]]
) -> Plan:
    """Predict tokens, FLOPs and memory of a call from its micro-batches."""
    lengths = [r.length for r in requests]
    scored = [sum(int(requests[i].needed.sum()) for i in batch) for batch in batches]
    groups = [[lengths[i] for i in batch] for batch in batches]
    forward = sum(_forward_flops(model, g, layout, n) for g, n in zip(groups, scored, strict=True))
    # A frozen matrix needs one product in the backward (for its input), a trained one two.
    backward = forward if model.trained < model.trunk / 2 else 2 * forward
    logits_at_once = sum(scored) if route == "single_pass" else max(scored, default=0)
    return Plan(
        route=route,
        reason=reason,
        micro_batches=batches,
        layout=layout,
        tokens=sum(_tokens(g, layout) for g in groups),
        scored=sum(scored),
        forward_flops=forward,
        backward_flops=backward,
        peak_bytes=8.0 * logits_at_once * model.vocab + float(model.trained * model.item_bytes),
    )


def _tokens(lengths: Sequence[int], layout: Layout) -> int:
    return padded_tokens(lengths) if layout == "padded" else sum(lengths)


def _forward_flops(model: Model, lengths: Sequence[int], layout: Layout, scored: int) -> float:
    tokens = _tokens(lengths, layout)
    match layout:
        case "packed":
            pairs = float(tokens) ** 2
        case "padded":
            pairs = float(tokens) * max(lengths)
        case "single":
            pairs = float(sum(n * n for n in lengths))
    return 2.0 * model.trunk * tokens + model.pair_flops * pairs + 2.0 * model.hidden * model.vocab * scored
