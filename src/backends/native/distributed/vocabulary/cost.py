"""What a head costs whose rows are dealt out: bytes that a process holds, and receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .....ops.logprobs import chunk_bytes
from .....ops.own_positions import Positions
from ....calls.prepared import PreparedCall

__all__ = ["positions_together", "rows_bytes", "shard_group"]

_FP32: Final = 4


def rows_bytes(
    kept: Sequence[Sequence[int]], own: int, hidden: int, rows: int, bytes_each: int, *, trained: bool, gpu: bool
) -> float:
    """Return what a head of V_r rows on this process holds, beside weights and their gradients.

    With n own positions, and N of all ranks, in the forwards whose graphs wait; N' in the largest forward; e bytes an
    activation, and w = max(4, e)::

        2 e n H             own hidden states, and their gradient
        e N H               those of all ranks, which the backward scores again
        e N' H + w N' H     their gradient, and its sum over ranks (once, where w = e)
        min(c, 4 N' V_r)    one chunk of logits, c being 12 MiB, on a GPU 512 MiB, or 4 V_r H of a trained head if that is more
        w V_r H             trained: the gradient of the rows, until it is added

    Args:
        kept: positions of each rank, in each forward whose graph waits at once.
        own: this rank, among them.
        hidden, rows: H and V_r.
        bytes_each: e.
        trained: the head has a gradient.
        gpu: it lies on one.
    """
    wide, most = max(_FP32, bytes_each), max((sum(each) for each in kept), default=0)
    states = 2 * sum(each[own] for each in kept) + sum(map(sum, kept)) + most
    summed = wide * most if wide != bytes_each else 0
    chunk = min(chunk_bytes(rows * hidden, trained=trained, gpu=gpu), _FP32 * most * rows)
    return float(hidden * (bytes_each * states + summed + (wide * rows if trained else 0)) + chunk)


def positions_together(call: PreparedCall, forward: Sequence[Sequence[int]], ranks: Sequence[int]) -> list[Positions]:
    """Return what some ranks score in one forward that all run at the same time.

    Args:
        call: the call.
        forward: the datums of each rank.
        ranks: those that have one head together.
    """
    return [_positions(call, forward[rank]) for rank in ranks]


def shard_group(mesh: DeviceMesh) -> list[int]:
    """Return the ranks, of those of a mesh counted from 0, that have one head together with this one."""
    members = sorted(mesh.mesh.flatten().tolist())
    (row,) = (each for each in mesh.mesh.reshape(-1, mesh.size(mesh.ndim - 1)).tolist() if dist.get_rank() in each)
    return [members.index(rank) for rank in row]


def _positions(call: PreparedCall, members: Sequence[int]) -> Positions:
    if not members:
        return Positions(1)  # a dummy's
    requests = [call.requests[i] for i in members]
    targets = requests[0].targets
    candidates = targets.shape[1] if targets.dim() > 1 else 1
    return Positions(sum(int(r.needed.sum()) for r in requests), candidates, requests[0].temperature)
