"""A command that torchrun runs in several processes: the same work in each, but only the first one prints and writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, TypeVar, final

import torch

from ..backends.native.distributed.ranks import Ranks, find_mesh

__all__ = ["ALONE", "Processes"]

T = TypeVar("T")


@final
@dataclass(frozen=True, eq=False)
class Processes:
    """The processes that run one command together.

    Attributes:
        ranks: the processes; None: this one alone.
    """

    ranks: Ranks | None = None

    @classmethod
    def here(cls, device: str = "cpu") -> Processes:
        """Return those that torchrun has started, or this process alone.

        Args:
            device: that the models of the command will be on.
        """
        mesh = find_mesh("auto", torch.device(device), None)
        return cls(None if mesh is None else Ranks.of(mesh, None))

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes files."""
        return self.ranks is None or self.ranks.rank == 0

    def same(self, value: T) -> T:
        """Return the first process's value, made of numbers, texts and lists: what clocks and temporary folders would decide
        differently everywhere."""
        if self.ranks is None:
            return value
        found: T = json.loads(self.ranks.broadcast_text(json.dumps(value)))
        return found


ALONE: Final = Processes()
