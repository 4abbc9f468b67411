"""From a model to an engine: on this process alone, or on all processes of a mesh."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ....errors import ConfigError
from ..engine import NativeEngine, as_causal_lm
from ..execution.memory import available_bytes
from .engine import DistributedEngine
from .ranks import Ranks
from .sharding import Reshard, Shards, shard_model, whole_bytes

__all__ = ["distributed_engine"]


def distributed_engine(
    model: nn.Module,
    reference: nn.Module | None,
    mesh: DeviceMesh,
    *,
    reshard: Reshard,
    timeout: float | None,
    build: Callable[..., NativeEngine],
) -> DistributedEngine:
    """Shard a model over a mesh, and return its engine.

    Args:
        model, reference: whole, the same on every process.
        mesh: of the processes.
        reshard: whether layers are freed after use; ``auto``: where whole weights and gradients would take more than half
            of the memory that is free.
        timeout: seconds that a process waits for the others.
        build: makes the engine of one process; it is told how to shard its model.
    """
    if reshard not in (True, False, "auto"):
        raise ConfigError(f"reshard must be auto, True or False, got {reshard!r}")
    ranks = Ranks.of(mesh, timeout)
    sizes = [whole_bytes(each) for each in (model, reference) if each is not None]
    device = next(model.parameters()).device
    room = float(ranks.gather(torch.tensor([available_bytes(device) / 2], dtype=torch.float64)).min())
    frees = sum(sizes) > room if reshard == "auto" else bool(reshard)
    local = build(shard=lambda module: shard_model(module, mesh))
    shards = Shards(model, local.model, frees, local.memory.meter)
    frozen: Shards | None = None
    if reference is not None:
        shard_model(reference, mesh)
        frozen = Shards(reference, as_causal_lm(reference), frees, None)
    return DistributedEngine(local, shards, ranks, frozen)
