"""A small batch as plain numbers, which converts to every form of input that a loss takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from ..datums.types import Datum, ModelInput
from ..losses.batch.token_batch import TokenBatch

__all__ = ["COLUMNS", "Case", "CaseSequence"]

_FIELDS = ("weights", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")
COLUMNS: Final = ("logprobs", *_FIELDS)


@final
@dataclass(frozen=True)
class CaseSequence:
    """One sequence; all lists have its length. Without ``pair_id`` 2i and 2i + 1 of a case are chosen and rejected."""

    logprobs: Sequence[float]
    weights: Sequence[float]
    advantages: Sequence[float]
    rollout_logprobs: Sequence[float]
    old_logprobs: Sequence[float]
    ref_logprobs: Sequence[float]
    group: int = 0
    pair_id: int | None = None
    role: int | None = None

    def trained(self) -> list[int]:
        """Return the positions of non-zero weight."""
        return [j for j, w in enumerate(self.weights) if w != 0]

    @property
    def label(self) -> int:
        """1 where its first trained token has a positive advantage, for losses that label sequences good or bad; else 0."""
        return int(self.advantages[(self.trained() or [0])[0]] > 0)

    @property
    def reference_point(self) -> float:
        """KTO's z0, nats; one for each group."""
        return 0.25 + 0.125 * self.group


@final
@dataclass(frozen=True)
class Case:
    """A batch of sequences.

    Attributes:
        sequences: the sequences.
        with_old: pass ``old_logprobs`` to the loss.
        padding: what the padding holds where a function of padded tensors is under test; it must have no effect.
    """

    sequences: tuple[CaseSequence, ...]
    with_old: bool = False
    padding: float = 0.0

    def batch(self) -> tuple[TokenBatch, Tensor]:
        """Return the packed fp64 batch and its leaf tensor of log-probs."""
        leaf = _flat(self.sequences, "logprobs").requires_grad_()
        inputs: dict[str, Any] = {name: _flat(self.sequences, name) for name in self._fields()}
        lengths = [len(s.logprobs) for s in self.sequences]
        return TokenBatch.from_packed(leaf, lengths, **self._per_sequence(), **inputs), leaf

    def padded(self, left: bool = False) -> tuple[TokenBatch, list[Tensor]]:
        """Return the padded batch, with NaN in the padding, and one leaf per sequence."""
        width = max(len(s.logprobs) for s in self.sequences) + 1
        leaves = [_double(s.logprobs).requires_grad_() for s in self.sequences]

        def pad(row: Tensor, fill: float) -> Tensor:
            padding = row.new_full((width - row.numel(),), fill)
            return torch.cat([padding, row] if left else [row, padding])

        def column(name: str) -> Tensor:
            fill = 0.0 if name == "weights" else torch.nan
            return torch.stack([pad(_double(getattr(s, name)), fill) for s in self.sequences])

        inputs = {name: column(name) for name in self._fields()}
        logprobs = torch.stack([pad(leaf, torch.nan) for leaf in leaves])
        return TokenBatch.from_padded(logprobs, inputs.pop("weights"), **self._per_sequence(), **inputs), leaves

    def datums(self) -> tuple[list[Datum], list[Tensor]]:
        """Return datums and one leaf per datum, for calls ``loss(data, logprobs)``."""
        data = []
        for s in self.sequences:
            inputs: dict[str, Any] = {name: list(getattr(s, name)) for name in self._fields()}
            inputs["logprobs"] = inputs.pop("rollout_logprobs")
            inputs |= {"target_tokens": [0] * len(s.logprobs), "group_id": [s.group]}
            inputs |= {"label": [s.label], "reference_point": [s.reference_point]}
            data.append(Datum(ModelInput.from_ints([0] * len(s.logprobs)), inputs))
        return data, [_double(s.logprobs).requires_grad_() for s in self.sequences]

    def with_logprobs(self, rows: Sequence[Sequence[float]]) -> Case:
        """Return the case with other log-probs of the policy, one list per sequence."""
        return replace(
            self, sequences=tuple(replace(s, logprobs=row) for s, row in zip(self.sequences, rows, strict=True))
        )

    def edited(self, field: str, edit: Callable[[int, int, float], float]) -> Case:
        """Return the case with another number for each token of a field: ``edit(sequence, token, number)``."""
        sequences = []
        for i, s in enumerate(self.sequences):
            other: dict[str, Any] = {field: [edit(i, j, x) for j, x in enumerate(getattr(s, field))]}
            sequences.append(replace(s, **other))
        return replace(self, sequences=tuple(sequences))

    def units(self) -> dict[str, Tensor]:
        """Return what belongs together: ``group_id``, and ``pair_id`` and ``role`` where given; int64 [B] each."""
        found = {"group_id": torch.tensor([s.group for s in self.sequences])}
        for name in ("pair_id", "role"):
            ids = [getattr(s, name) for s in self.sequences]
            if None not in ids:
                found[name] = torch.tensor(ids)
        return found

    def subset(self, indices: Sequence[int]) -> Case:
        """Return some of the sequences, in that order."""
        return replace(self, sequences=tuple(self.sequences[i] for i in indices))

    def labels(self) -> dict[str, Tensor]:
        """Return what a loss of labelled sequences reads: ``label``, int64 [B], and ``reference_point``, float64 [B]."""
        points = _double([s.reference_point for s in self.sequences])
        return {"label": torch.tensor([s.label for s in self.sequences]), "reference_point": points}

    def _per_sequence(self) -> dict[str, Tensor]:
        return {"group_id": torch.tensor([s.group for s in self.sequences]), **self.labels()}

    def _fields(self) -> list[str]:
        return [name for name in _FIELDS if name != "old_logprobs" or self.with_old]


def _flat(sequences: Sequence[CaseSequence], name: str) -> Tensor:
    return _double([x for s in sequences for x in getattr(s, name)])


def _double(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
