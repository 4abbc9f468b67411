"""Which datums of a call belong together: pairs, groups, or everything."""

from __future__ import annotations

from collections.abc import Sequence

from ...datums.types import Datum
from ...losses.base import GradientKind, Loss
from ...losses.batch.adapt import as_tensor

__all__ = ["by_group", "loss_units"]


def by_group(loss: Loss) -> bool:
    """Return whether a loss takes a mean over prompt groups, or within each."""
    return loss.main_aggregation.by_group


def loss_units(loss: Loss, kind: GradientKind, data: Sequence[Datum]) -> list[list[int]]:
    """Return the datums that must stay in one micro-batch: pairs, groups, the whole batch, or single datums."""
    if kind == "batch":
        return [list(range(len(data)))]
    if kind == "pair":
        if "pair_id" not in data[0].loss_fn_inputs:
            return [[i, i + 1] for i in range(0, len(data), 2)]
        return _by_id("pair_id", data)
    if by_group(loss):
        return _by_id("group_id", data)
    return [[i] for i in range(len(data))]


def _by_id(key: str, data: Sequence[Datum]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for i, datum in enumerate(data):
        members.setdefault(int(as_tensor(datum.loss_fn_inputs[key])), []).append(i)
    return list(members.values())
