"""What a call will cost, and the layout that costs least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from torch import nn

from ....ops.head import Head
from ...calls.requests import ScoreRequest
from ..models.facts.quantized import weight_count
from .batching import Layout, micro_batches, own_lengths, padded_tokens

__all__ = ["BaseFlops", "ModelSizes", "base_flops", "choose_layout", "describe_model", "forward_tokens"]


@final
@dataclass(frozen=True)
class ModelSizes:
    """The sizes that cost is made of.

    Attributes:
        base: parameters that multiply every token (embeddings and head left out).
        trained: trainable parameters.
        hidden, vocab: size of the head.
        pair_flops: FLOPs of attention per pair of tokens, all layers.
        frozen_head: True if the head has no gradient.
        item_bytes: bytes of a trainable parameter.
        segments: packed sequences attend by themselves, not under a mask over all tokens.
    """

    base: int
    trained: int
    hidden: int
    vocab: int
    pair_flops: float
    frozen_head: bool
    item_bytes: int
    segments: bool


def describe_model(module: nn.Module, head: Head, pair_flops: float) -> ModelSizes:
    """Measure a model: every matrix outside embeddings and head multiplies every token."""
    vocab, hidden = head.weight.shape
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in module.parameters() if p.dim() >= 2 and p is not head.weight and id(p) not in embeddings]
    trained = [p for p in module.parameters() if p.requires_grad]
    return ModelSizes(
        base=sum(weight_count(p) for p in matrices),
        trained=sum(p.numel() for p in trained),
        hidden=hidden,
        vocab=vocab,
        pair_flops=pair_flops,
        frozen_head=not head.weight.requires_grad,
        item_bytes=max((p.element_size() for p in trained), default=4),
        segments=bool(getattr(module, "attends_by_segment", False)),
    )


def choose_layout(
    model: ModelSizes, allowed: Sequence[Layout], requests: Sequence[ScoreRequest], budget: int
) -> Layout:
    """Return the allowed layout with the fewest FLOPs: padding wastes tokens, packing wastes attention."""
    ranked = [layout for layout in allowed if layout != "single"]
    if not ranked:
        return "single"
    lengths, units = [r.length for r in requests], [[i] for i in range(len(requests))]

    def cost(layout: Layout) -> float:
        batches = micro_batches(units, lengths, budget, layout)
        return sum(sum(base_flops(model, [requests[i] for i in batch], layout)) for batch in batches)

    return min(ranked, key=cost)


def forward_tokens(requests: Sequence[ScoreRequest], layout: Layout) -> int:
    return padded_tokens([r.length for r in requests]) if layout == "padded" else sum(own_lengths(requests, layout))


class BaseFlops(NamedTuple):
    """FLOPs of the base model's forward, the head left out."""

    linear: float
    attention: float


def base_flops(model: ModelSizes, requests: Sequence[ScoreRequest], layout: Layout) -> BaseFlops:
    tokens, lengths = forward_tokens(requests, layout), [r.length for r in requests]
    match layout:
        case "packed" | "forked" if not model.segments:
            pairs = float(tokens) ** 2
        case "padded":
            pairs = float(tokens) * max(lengths)
        case _:
            pairs = float(sum(own * n for own, n in zip(own_lengths(requests, layout), lengths, strict=True)))
    return BaseFlops(2.0 * model.base * tokens, model.pair_flops * pairs)
