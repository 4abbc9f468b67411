"""The bytes that one process receives from others in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import final

from .inputs import Placement, Step, Weight, bytes_by_layer

__all__ = ["Traffic", "traffic"]


@final
@dataclass(frozen=True)
class Traffic:
    """Bytes that one process receives from others in a step; it sends as many.

    Attributes:
        gathers, reductions: of weights; of gradients, within a group of shards.
        replicas: of reduced gradients, between replicas.
        logprobs: of log-probs and cotangents.
        head: of a vocabulary-parallel head.
    """

    gathers: float
    reductions: float
    replicas: float
    logprobs: float
    head: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of all of them."""
        return self.gathers + self.reductions + self.replicas + self.logprobs + self.head

    def to_json(self) -> dict[str, float]:
        """Return the parts and their total by name."""
        return asdict(self) | {"total": self.total}


def traffic(model: Sequence[Weight], placement: Placement, step: Step) -> Traffic:
    """Return what one process receives in a step.

    With s shards in each of r replicas, n = s r ranks, G bytes of whole weights as they are computed with, R bytes of whole
    gradients (fp32 or better), c calls, and m targets of a rank at most, of l bytes::

        without resharding   G (s - 1) / s gathered,  c R (s - 1) / s reduced
        with resharding      (G_root + (forwards + backwards) G_layers) (s - 1) / s,  backwards R (s - 1) / s
        between replicas     2 (R / s) (r - 1) / r with each reduction; a head in parts: once a call
        head in parts        see `exchange_bytes`; neither gathered nor reduced
        log-probs            2 m l (n - 1): they and their cotangents, filled up to those of the rank with most;
                             m l (n - 1) + N l for a function of all N, whose cotangents rank 0 sends

    With fp32 weights, all of them trained, in one call: 2 P (n - 1) / n and log-probs. What ranks agree on (which
    operation, which batch, whether all went well) is some ten kilobytes an operation and left out.
    """
    if not placement.sharded:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    shards, replicas = placement.shards, placement.replicas
    others = (shards - 1) / shards
    sizes = bytes_by_layer((w, w.gathered(shards)) for w in model)
    outside, layers = sizes.pop(None), sum(sizes.values())
    passes = step.forwards + step.backwards if placement.reshard else 1
    gradients = sum(w.gradient(shards) for w in model)
    rows = sum(w.shard(shards) * w.gradient_each for w in model if w.in_parts and w.trained)
    reductions = step.backwards if placement.reshard else step.calls
    entries = (1 if step.broadcast else 2) * step.targets * (placement.ranks - 1) + step.broadcast
    return Traffic(
        gathers=(outside + passes * layers) * others,
        reductions=reductions * gradients * others,
        replicas=2.0 * (reductions * gradients / shards + step.calls * rows) * (replicas - 1) / replicas,
        logprobs=float(entries * step.logprob_bytes),
        head=step.head_received,
    )
