"""From a model to an engine: on this process alone, or on all processes of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ....errors import ConfigError
from ..causal_lm import as_causal_lm
from ..dtensors import require_whole
from ..engine import NativeEngine
from ..execution.memory import available_bytes
from .agreement.agreement import Agreement
from .agreement.digest import parameter_fingerprints
from .engine import DistributedEngine
from .ranks import Ranks
from .sharding import Reshard, Shards, shard_model, whole_bytes
from .vocabulary.choice import VocabParallel, choose_rows
from .vocabulary.rows import HeadRows

__all__ = ["distributed_engine"]


def distributed_engine(
    model: nn.Module,
    reference: nn.Module | None,
    mesh: DeviceMesh,
    *,
    reshard: Reshard,
    shard_frozen: bool,
    vocab_parallel: VocabParallel,
    timeout: float | None,
    build: Callable[..., NativeEngine],
) -> DistributedEngine:
    """Shard a model over a mesh, and return its engine.

    Args:
        model, reference: whole, the same on every process.
        mesh: of the processes.
        reshard: whether layers are freed after use; ``auto``: where whole weights and gradients would take more than half
            of the memory that is free.
        shard_frozen: whether frozen weights are sharded too.
        vocab_parallel: whether the head is cut by rows; see `choose_rows`.
        timeout: seconds that a process waits for the others.
        build: makes the engine of one process; it is told how to shard its model.
    """
    if reshard not in (True, False, "auto"):
        raise ConfigError(f"reshard must be auto, True or False, got {reshard!r}")
    ranks = Ranks.of(mesh, timeout)
    agreement = Agreement(ranks)
    settings = f"reshard={reshard}, shard_frozen={shard_frozen}, vocab_parallel={vocab_parallel}"
    with agreement.operation("TorchBackend"):
        agreement.meet("choice of settings", text=f"{settings}, {_choices(build)}")
        models = [each for each in (model, reference) if each is not None]
        for each in models:
            require_whole(each)
            prints = parameter_fingerprints(each)
            agreement.meet("model", *prints.values(), names=[f"its parameter {name}" for name in prints])
        room = ranks.least(available_bytes(next(model.parameters()).device) / 2)
        frees = sum(map(whole_bytes, models)) > room if reshard == "auto" else bool(reshard)
        policy, other = as_causal_lm(model), None if reference is None else as_causal_lm(reference)
        rows, others = agreement.attempt(
            "choice of the head", lambda: choose_rows(vocab_parallel, policy, other, 2 * room, shard_frozen)
        )
        shard = partial(shard_model, mesh=mesh, frozen=shard_frozen, rows=rows)
        local = agreement.attempt("probes of the model", lambda: build(shard=shard))
        agreement.meet("table of layouts", text=repr(dict(local.scheduler.layouts.longest)))
        with agreement.together("sharding"):
            shards = Shards(model, local.model, frees, local.memory.meter, rows)
            frozen = None if reference is None else _frozen(reference, mesh, frees, others)
    return DistributedEngine(local, shards, ranks, agreement, frozen)


def _choices(build: Callable[..., NativeEngine]) -> dict[str, object]:
    """Return the settings that decide what each process computes, and when."""
    given: dict[str, object] = getattr(build, "keywords", {})
    own = ("reference", "checkpoint_dir")  # a model, compared apart; a folder, compared when it is written to
    return {name: value for name, value in sorted(given.items()) if name not in own}


def _frozen(reference: nn.Module, mesh: DeviceMesh, frees: bool, rows: HeadRows | None) -> Shards:
    shard_model(reference, mesh, rows=rows)
    return Shards(reference, as_causal_lm(reference), frees, None, rows)
