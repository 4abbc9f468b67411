"""How a call is cut into forwards: the layout, and micro-batches within the memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from ...prepared import PreparedCall
from ..causal_lm import CausalLM
from ..models.facts.probes import LayoutLimits
from .batching import Layout, MicroBatch, micro_batches
from .cost_model import ModelSizes, choose_layout
from .memory import MemoryBudget

__all__ = ["Scheduler", "by_temperature"]


@final
@dataclass(frozen=True, eq=False)
class Scheduler:
    """Cuts calls.

    Attributes:
        model: which is to run them.
        layouts: those that keep sequences of one forward apart, and up to which length.
        sizes: what cost is made of.
        memory: how much of it a call may take.
    """

    model: CausalLM
    layouts: LayoutLimits
    sizes: ModelSizes
    memory: MemoryBudget

    def split(self, call: PreparedCall, units: Sequence[Sequence[int]]) -> tuple[Layout, list[list[int]]]:
        """Return the layout of a call, and its units in batches of the size of one forward."""
        allowed = self.layouts.allowed(max(call.lengths))
        layout = choose_layout(self.sizes, allowed, call.requests, self.memory.tokens)
        return layout, micro_batches(units, call.lengths, self.memory.tokens, layout)

    def datums(self, call: PreparedCall) -> tuple[Layout, list[list[int]]]:
        """Return the layout, and batches of datums that need not stay together."""
        layout, batches = self.split(call, [[i] for i in range(len(call.data))])
        return layout, [part for batch in batches for part in by_temperature(call, batch)]

    def forwards(self, call: PreparedCall, batch: Sequence[int], layout: Layout) -> list[list[int]]:
        """Split a batch of whole units further if it is larger than one forward may be."""
        lengths = {i: call.lengths[i] for i in batch}
        batches = micro_batches([[i] for i in batch], lengths, self.memory.tokens, layout)
        return [part for members in batches for part in by_temperature(call, members)]

    def micro_batch(self, call: PreparedCall, members: Sequence[int], layout: Layout) -> MicroBatch:
        """Lay some datums out."""
        return MicroBatch.of([call.requests[i] for i in members], layout, self.memory.device, members)

    def gradient_batches(self, call: PreparedCall) -> tuple[Layout, list[list[MicroBatch]]]:
        """Return batches of whole units, each as one or more forwards; for a function, which sees everything, one batch."""
        if call.registered is None:
            layout, batches = self.datums(call)
            return layout, [[self.micro_batch(call, batch, layout) for batch in batches]]
        layout, batches = self.split(call, call.units)
        apart = [self.forwards(call, batch, layout) for batch in batches]
        return layout, [[self.micro_batch(call, forward, layout) for forward in batch] for batch in apart]


def by_temperature(call: PreparedCall, members: Sequence[int]) -> list[list[int]]:
    """Return the datums of a forward apart by the temperature that they are scored at."""
    apart: dict[float, list[int]] = {}
    for i in members:
        apart.setdefault(call.requests[i].temperature, []).append(i)
    return list(apart.values())
