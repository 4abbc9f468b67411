"""Which rank scores which datums, in which forwards: the same on every rank, from lengths alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ...calls.prepared import PreparedCall
from ..execution.batching import Layout, MicroBatch
from ..execution.memory import GraphSettings, MemoryBudget
from ..execution.scheduler import Scheduler
from .ranks import Ranks

__all__ = ["Schedule", "Share", "share_out"]

_Units = Sequence[Sequence[int]]  # of datums
_Batches = list[list[list[int]]]  # of forwards, each of datums


def share_out(units: _Units, lengths: Sequence[int], ranks: int) -> list[list[Sequence[int]]]:
    """Return the units of each rank.

    Long ones go first, each to the rank that has the fewest tokens by then; so no rank has more than the longest unit above
    the mean. Some ranks have none where there are fewer units than ranks.

    Args:
        units: datums that must stay together.
        lengths: of all datums, tokens.
        ranks: how many there are.
    """
    sizes = [sum(lengths[i] for i in unit) for unit in units]
    loads, found = [0] * ranks, [list[int]() for _ in range(ranks)]
    for unit in sorted(range(len(units)), key=lambda unit: (-sizes[unit], unit)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[rank] += sizes[unit]
        found[rank].append(unit)
    return [[units[unit] for unit in sorted(own)] for own in found]


@final
@dataclass(frozen=True, eq=False)
class Share:
    """What one rank does of a call, and what the others do.

    Attributes:
        batches: of whole units, each as one or more forwards.
        layout: of all forwards.
        members: the datums of each rank, in order.
        ranks: the processes.
        in_step: every rank runs the same forwards, some of them dummies.
        together: where they do, the datums of each rank in each forward; none: a dummy.
    """

    batches: Sequence[Sequence[MicroBatch]]
    layout: Layout
    members: Sequence[Sequence[int]]
    ranks: Ranks
    in_step: bool
    together: Sequence[Sequence[Sequence[int]]] = ()

    @property
    def forwards(self) -> list[MicroBatch]:
        """All of this rank."""
        return [forward for batch in self.batches for forward in batch]

    @property
    def own(self) -> Sequence[int]:
        """The datums of this rank."""
        return self.members[self.ranks.rank]

    def settings(self, memory: MemoryBudget) -> GraphSettings:
        """Return how graphs are retained; what must be the same on every rank is agreed."""
        own = memory.settings(self.layout)
        if not self.in_step:
            return own
        said = self.ranks.gather(torch.tensor([own.budget, own.meter.predict(1)], dtype=torch.float64))
        return replace(own, budget=float(said[:, 0].min()), bytes_per_token=float(said[:, 1].max()))

    def gather(self, own: Mapping[int, Tensor], call: PreparedCall, dtype: torch.dtype) -> list[Tensor]:
        """Return a tensor of the shape of its targets for every datum of a call, from those that each rank has of its own."""
        shapes = [request.targets.shape for request in call.requests]
        sizes = [sum(shapes[i].numel() for i in members) for members in self.members]
        flat = torch.cat([torch.zeros(0, dtype=dtype), *(own[i].reshape(-1).to("cpu", dtype) for i in self.own)])
        found: dict[int, Tensor] = {}
        for members, values in zip(self.members, self.ranks.gather_ragged(flat, sizes), strict=True):
            apart = torch.split(values, [shapes[i].numel() for i in members])
            found |= {i: each.reshape(shapes[i]).clone() for i, each in zip(members, apart, strict=True)}
        return [found[i] for i in range(len(shapes))]


@final
@dataclass(frozen=True, eq=False)
class Schedule:
    """Deals calls out to ranks.

    Attributes:
        scheduler: cuts what one rank has into forwards.
        ranks: the processes.
        in_step: every rank must run as many forwards, as in them layers are gathered and freed, or ranks score together.
    """

    scheduler: Scheduler
    ranks: Ranks
    in_step: bool

    def datums(self, call: PreparedCall) -> Share:
        """Deal out datums that need not stay together."""
        singles = share_out([[i] for i in range(len(call.data))], call.lengths, self.ranks.size)

        def cut(own: _Units) -> tuple[Layout, _Batches]:
            layout, found = self.scheduler.datums(call, [i for unit in own for i in unit])
            return layout, [found]

        return self._share(call, singles, cut)

    def units(self, call: PreparedCall) -> Share:
        """Deal out whole units, which a rank evaluates the loss on."""
        units = share_out(call.units, call.lengths, self.ranks.size)
        return self._share(call, units, lambda own: self.scheduler.unit_batches(call, own))

    def _share(
        self, call: PreparedCall, units: Sequence[_Units], cut: Callable[[_Units], tuple[Layout, _Batches]]
    ) -> Share:
        """Lay out what this rank is dealt; what the others are matters only where all keep step."""
        rank = self.ranks.rank
        layout, own = cut(units[rank])
        members = [sorted(i for unit in each for i in unit) for each in units]
        if not self.in_step:
            alone = [[self.scheduler.micro_batch(call, forward, layout) for forward in batch] for batch in own]
            return Share(alone, layout, members, self.ranks, False)

        def laid_out(forward: Sequence[Sequence[int]]) -> MicroBatch:
            most = max(sum(call.lengths[i] for i in each) for each in forward)
            return self.scheduler.micro_batch(call, forward[rank], layout, most)

        every = _in_step([_apart(*cut(each)) for each in units])
        batches = [[laid_out(forward) for forward in batch] for batch in every]
        return Share(batches, layout, members, self.ranks, True, [forward for batch in every for forward in batch])


def _apart(layout: Layout, batches: _Batches) -> _Batches:
    """Return batches whose forwards run the model once each: where sequences run one by one, each is a forward."""
    if layout != "single":
        return batches
    return [[[i] for forward in batch for i in forward] for batch in batches]


def _in_step(every: list[_Batches]) -> list[list[list[list[int]]]]:
    """Return batches of forwards, each with the datums of every rank: none where only others have some."""

    def forward(rank: int, k: int, f: int) -> list[int]:
        batches = every[rank]
        return batches[k][f] if k < len(batches) and f < len(batches[k]) else []

    most = [max(len(b[k]) if k < len(b) else 0 for b in every) for k in range(max(map(len, every)))]
    ranks = range(len(every))
    return [[[forward(rank, k, f) for rank in ranks] for f in range(count)] for k, count in enumerate(most)]
