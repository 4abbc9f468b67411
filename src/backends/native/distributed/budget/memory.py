"""The bytes that one process holds in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, final

from .inputs import FP32, Placement, Step, Weight, bytes_by_layer

__all__ = ["RankMemory", "rank_memory"]

_MOMENTS: Final = 2
_LAYERS_AT_ONCE: Final = 2  # one computes while the next one arrives


@final
@dataclass(frozen=True)
class RankMemory:
    """Bytes that one process holds, by what they are for.

    Attributes:
        weights: shards, or on one process the whole; shards of trained half-precision weights are fp32.
        masters: fp32 copies of trained half-precision weights; 0 where shards serve as such.
        gradients: what has accumulated, between calls.
        moments: AdamW's two.
        gathered_weights: whole weights, as long as they are used.
        gathered_gradients: the gradients of the call that runs, before they are reduced or added to earlier ones.
        graphs: what autograd retains for the backward.
        head: hidden states at the head with their gradients, and one chunk of logits.
        stepping: a step's divided and clipped copy of the gradients.
    """

    weights: float
    masters: float
    gradients: float
    moments: float
    gathered_weights: float
    gathered_gradients: float
    graphs: float
    head: float
    stepping: float

    @property
    def resting(self) -> float:
        """Between two operations, gathered weights left out: weights, masters, gradients and moments."""
        return self.weights + self.masters + self.gradients + self.moments

    @property
    def total(self) -> float:
        """At most: in a backward, or in a step, in which there are no graphs and nothing is gathered."""
        backward = self.gathered_weights + self.gathered_gradients + self.graphs + self.head
        return self.resting + max(backward, self.stepping)

    def to_json(self) -> dict[str, float]:
        """Return the parts and their total by name."""
        return asdict(self) | {"total": self.total}


def rank_memory(model: Sequence[Weight], placement: Placement, step: Step) -> RankMemory:
    """Return what one process holds.

    With s shards, P weights and T trained ones of b bytes each, and g = max(4, b) bytes for what is fp32 (``gathered`` leaves a
    head in parts out, but for its rows in b bytes where shards are masters)::

        weights            P b / s      (P 4 / s where trained ones are in half precision and sharded)
        masters            T 4          (half precision, one process)
        gradients          T g / s
        moments            2 T g / s
        gathered weights   P b, or with resharding those outside of layers and two layers' (0 on one process)
        gathered gradients T g; with resharding T b outside of layers, and whatever is reduced at once, a layer or what is
                           outside of layers, as computed and as sent, T b + T g (0 on one process);
                           T g / s more from the second call of an accumulation
        stepping           T g / s

    Args:
        model: its parameters.
        placement: the processes.
        step: what they do.
    """
    shards, sharded = placement.shards, placement.sharded
    as_masters = sharded and any(w.half for w in model)
    trained = float(sum(w.shard(shards) * w.gradient_each for w in model if w.trained))
    again = trained if step.calls > 1 else 0.0  # the later calls' own, until they are added
    return RankMemory(
        weights=float(sum(w.shard(shards) * (FP32 if as_masters else w.bytes_each) for w in model)),
        masters=0.0 if sharded else float(sum(w.shard(1) * FP32 for w in model if w.half)),
        gradients=trained,
        moments=_MOMENTS * trained,
        gathered_weights=_whole(model, placement) if sharded else 0.0,
        gathered_gradients=(_waiting(model, placement) if sharded else 0.0) + again,
        graphs=step.graph_bytes,
        head=step.head_bytes,
        stepping=trained,
    )


def _whole(model: Sequence[Weight], placement: Placement) -> float:
    """Return bytes of the weights that are whole on a rank at once."""
    sizes = bytes_by_layer((w, w.gathered(placement.shards)) for w in model)
    outside, layers = sizes.pop(None), sorted(sizes.values(), reverse=True)
    outside += sum(w.shard(placement.shards) * w.bytes_each for w in model if w.in_parts and any(x.half for x in model))
    return float(outside + sum(layers[:_LAYERS_AT_ONCE] if placement.reshard else layers))


def _waiting(model: Sequence[Weight], placement: Placement) -> float:
    """Return bytes of the gradients that are whole on a rank at once."""
    sent = bytes_by_layer((w, w.gradient(placement.shards)) for w in model)
    if not placement.reshard:
        return float(sum(sent.values()))
    computed = bytes_by_layer((w, w.gathered(placement.shards)) for w in model if w.trained)
    layers = [sent[layer] + computed[layer] for layer in computed if layer is not None]
    return float(computed[None] + max([sent[None], *layers]))
