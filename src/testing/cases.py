"""Case: a small batch as plain numbers, from which every form of a loss's input can be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from ..datums.types import Datum, ModelInput
from ..losses.batch import TokenBatch

__all__ = ["Case", "CaseSequence"]

_FIELDS = ("weights", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")


@final
@dataclass(frozen=True)
class CaseSequence:
    """One sequence; all lists have its length. Neighbours (2i, 2i + 1) are chosen and rejected."""

    logprobs: Sequence[float]
    weights: Sequence[float]
    advantages: Sequence[float]
    rollout_logprobs: Sequence[float]
    old_logprobs: Sequence[float]
    ref_logprobs: Sequence[float]
    group: int = 0

    def trained(self) -> list[int]:
        """The positions of non-zero weight."""
        return [j for j, w in enumerate(self.weights) if w != 0]


@final
@dataclass(frozen=True)
class Case:
    """Several sequences."""

    sequences: tuple[CaseSequence, ...]
    with_old: bool = False

    def batch(self) -> tuple[TokenBatch, Tensor]:
        """Return the packed fp64 batch and its log-prob leaf."""
        leaf = _flat(self.sequences, "logprobs").requires_grad_()
        inputs: dict[str, Any] = {name: _flat(self.sequences, name) for name in self._fields()}
        groups = torch.tensor([s.group for s in self.sequences])
        lengths = [len(s.logprobs) for s in self.sequences]
        return TokenBatch.from_packed(leaf, lengths, group_id=groups, **inputs), leaf

    def padded(self, left: bool = False) -> tuple[TokenBatch, list[Tensor]]:
        """Return the padded batch (NaN in the padding) and one leaf per sequence."""
        width = max(len(s.logprobs) for s in self.sequences) + 1
        leaves = [torch.tensor(list(s.logprobs), dtype=torch.float64).requires_grad_() for s in self.sequences]

        def pad(row: Tensor, fill: float) -> Tensor:
            rest = row.new_full((width - row.numel(),), fill)
            return torch.cat([rest, row] if left else [row, rest])

        inputs = {
            name: torch.stack(
                [
                    pad(
                        torch.tensor(list(getattr(s, name)), dtype=torch.float64),
                        0.0 if name == "weights" else torch.nan,
                    )
                    for s in self.sequences
                ]
            )
            for name in self._fields()
        }
        logprobs = torch.stack([pad(leaf, torch.nan) for leaf in leaves])
        groups = torch.tensor([s.group for s in self.sequences])
        return TokenBatch.from_padded(logprobs, inputs.pop("weights"), group_id=groups, **inputs), leaves

    def datums(self) -> tuple[list[Datum], list[Tensor]]:
        """Return datums and one leaf per datum, for the ``(data, logprobs)`` door."""
        data = []
        for s in self.sequences:
            inputs: dict[str, Any] = {name: list(getattr(s, name)) for name in self._fields()}
            inputs["logprobs"] = inputs.pop("rollout_logprobs")
            inputs |= {"target_tokens": [0] * len(s.logprobs), "group_id": [s.group]}
            data.append(Datum(ModelInput.from_ints([0] * len(s.logprobs)), inputs))
        return data, [torch.tensor(list(s.logprobs), dtype=torch.float64).requires_grad_() for s in self.sequences]

    def subset(self, indices: Sequence[int]) -> Case:
        """Return some of the sequences, in that order."""
        return replace(self, sequences=tuple(self.sequences[i] for i in indices))

    def _fields(self) -> list[str]:
        return [name for name in _FIELDS if name != "old_logprobs" or self.with_old]


def _flat(sequences: Sequence[CaseSequence], name: str) -> Tensor:
    return torch.tensor([x for s in sequences for x in getattr(s, name)], dtype=torch.float64)
