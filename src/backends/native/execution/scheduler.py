"""How a call is cut into forwards: the layout, and micro-batches within the memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from ...calls.prepared import PreparedCall
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

    def datums(self, call: PreparedCall, members: Sequence[int] | None = None) -> tuple[Layout, list[list[int]]]:
        """Return the layout, and batches of datums (default: all) that need not stay together."""
        layout, batches = self.split(call, [[i] for i in (range(len(call.data)) if members is None else members)])
        return layout, [part for batch in batches for part in by_temperature(call, batch)]

    def forwards_of(self, call: PreparedCall) -> Iterator[MicroBatch]:
        """Yield the forwards that score a call."""
        layout, batches = self.datums(call)
        return (self.micro_batch(call, members, layout) for members in batches)

    def forwards(self, call: PreparedCall, batch: Sequence[int], layout: Layout) -> list[list[int]]:
        """Split a batch of whole units further if it is larger than one forward may be."""
        lengths = {i: call.lengths[i] for i in batch}
        batches = micro_batches([[i] for i in batch], lengths, self.memory.tokens, layout)
        return [part for members in batches for part in by_temperature(call, members)]

    def micro_batch(
        self, call: PreparedCall, members: Sequence[int], layout: Layout, most_tokens: int = 0
    ) -> MicroBatch:
        """Lay some datums out; none: a dummy."""
        if not members:
            return MicroBatch.dummy(self.memory.device, most_tokens)
        return MicroBatch.of([call.requests[i] for i in members], layout, self.memory.device, members, most_tokens)

    def gradient_batches(self, call: PreparedCall) -> tuple[Layout, list[list[MicroBatch]]]:
        """Return batches of whole units, each as one or more forwards; for a function, which sees everything, one batch."""
        if call.registered is None:
            layout, datums = self.datums(call)
            return layout, [[self.micro_batch(call, batch, layout) for batch in datums]]
        layout, batches = self.unit_batches(call, call.units)
        return layout, [[self.micro_batch(call, forward, layout) for forward in batch] for batch in batches]

    def unit_batches(self, call: PreparedCall, units: Sequence[Sequence[int]]) -> tuple[Layout, list[list[list[int]]]]:
        """Return the layout of a call, and batches of some of its units, each as the datums of one or more forwards."""
        layout, batches = self.split(call, units)
        return layout, [self.forwards(call, batch, layout) for batch in batches]


def by_temperature(call: PreparedCall, members: Sequence[int]) -> list[list[int]]:
    """Return the datums of a forward apart by the temperature that they are scored at."""
    apart: dict[float, list[int]] = {}
    for i in members:
        apart.setdefault(call.requests[i].temperature, []).append(i)
    return list(apart.values())
