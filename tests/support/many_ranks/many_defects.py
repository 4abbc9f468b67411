"""One rank of a job with one defect planted after another: how far each ends from one process, or which error it meets."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
import torch.distributed as dist
from many_ranks.many_cases import LOSSES, MODELS, apart, batch, steps
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from pullback.backends import TorchBackend
from pullback.backends.calls import cotangents
from pullback.backends.native.distributed import passes, schedule, sharding
from pullback.backends.native.distributed.agreement import agreement
from pullback.backends.native.dtensors import local_part
from pullback.backends.native.models.lora import add_lora
from pullback.errors import PullbackError

__all__ = ["DEFECTS", "names"]

UNEVEN: Final = [batch((12, 3, 5, 2))]


def divided_by_world_twice(backend: TorchBackend) -> Any:
    """FSDP's own habit, the mean over ranks, on top of the loss's division."""
    for unit in backend.model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(float(dist.get_world_size()))
    return mock.patch.object(sharding, "nothing", create=True)


def local_counts(backend: TorchBackend) -> Any:
    """Each rank divides by the tokens of its own share."""
    everywhere: Any = backend._everywhere

    def own(call: Any, logprobs: Any) -> Any:
        share = schedule.Schedule(everywhere.local.scheduler, everywhere._ranks, False).units(call)
        whole = cotangents.evaluate
        return replace(whole(call, logprobs), count=whole(call, {i: logprobs[i] for i in share.own}).count)

    return mock.patch.object(passes, "evaluate", own)


def missing_reduction(name: str) -> Callable[[TorchBackend], Any]:
    """What rank 1 has found for one parameter is never added."""

    def plant(backend: TorchBackend) -> Any:
        reduce = sharding.Shards.reduce

        def without(shards: sharding.Shards, *given: Any) -> bool:
            if dist.get_rank() == 1:
                dict(shards.module.named_parameters())[name].grad = None
            return reduce(shards, *given)

        return mock.patch.object(sharding.Shards, "reduce", without)

    return plant


def local_clip(backend: TorchBackend) -> Any:
    """Each rank clips by the norm of its own shards."""
    whole = torch.nn.utils.get_total_norm
    return mock.patch.object(
        torch.nn.utils, "get_total_norm", lambda found, *given: whole([local_part(g) for g in found], *given)
    )


def rank_order(backend: TorchBackend) -> Any:
    """Log-probs are taken in the order of ranks, not of datums."""
    gather = schedule.Share.gather

    def shuffled(share: schedule.Share, own: Any, call: Any, dtype: Any) -> Any:
        found = gather(share, own, call, dtype)
        return [found[i] for members in share.members for i in members]

    return mock.patch.object(schedule.Share, "gather", shuffled)


DEFECTS: Final[dict[str, tuple[str, Any, Callable[[TorchBackend], Any]]]] = {
    "divided by world twice": ("grpo", UNEVEN, divided_by_world_twice),
    "local counts": ("grpo", UNEVEN, local_counts),
    "local clip": ("grpo", UNEVEN, local_clip),
    "rank order": ("ordered", [batch((5, 5, 5, 5))], rank_order),
}


def names() -> list[str]:
    """The parameters of the small model, each of which may miss its reduction."""
    return [name for name, _ in MODELS["full"]().named_parameters()]


def many() -> TorchBackend:
    return TorchBackend(MODELS["full"](), reshard=False, timeout=60)


def distances(loss: str, calls: Any, plant: Callable[[TorchBackend], Any]) -> dict[str, float] | str:
    """Return how far a defect leads from one process, or the error that notices it."""
    backend, one = many(), TorchBackend(MODELS["full"](), mesh=None)
    try:
        with plant(backend):
            found = steps(backend, LOSSES[loss], calls)
    except PullbackError as problem:
        return f"{type(problem).__name__}: {problem}"
    return apart(found, steps(one, LOSSES[loss], calls))


@contextmanager
def caught(found: dict[str, Any], name: str, backend: TorchBackend, before: dict[str, Any]) -> Iterator[None]:
    """Note the error that an operation meets, and whether the accumulation is as it was."""
    try:
        yield
        error = ""
    except PullbackError as problem:
        error = f"{type(problem).__name__}: {problem}"
    found[name] = {"error": error, "untouched": max(apart(backend.gradients(), before).values()) == 0.0}


def refused() -> dict[str, Any]:
    """What an agreement notices, and what happens where it does not look."""
    found: dict[str, Any] = {}
    backend, rank = many(), dist.get_rank()
    data, other = batch(), batch(seed=8)
    backend.forward_backward(data, "ppo").result()
    before = backend.gradients()
    with caught(found, "other data", backend, before):
        backend.forward_backward(data if rank == 0 else other, "ppo").result()
    with caught(found, "another loss", backend, before):
        backend.forward_backward(data, "ppo" if rank == 0 else "cross_entropy").result()
    for bad in range(dist.get_world_size()):
        with caught(found, f"nan on rank {bad}", backend, before), not_finite(bad):
            backend.forward_backward(data, "ppo").result()
    blind = many()
    with mock.patch.object(agreement.Agreement, "_require_equal"), mock.patch.object(passes, "require_one_loss"):
        blind.forward_backward(data if rank == 0 else other, "ppo").result()
    found["other data, unnoticed"] = apart(blind.gradients(), before)
    return found


@contextmanager
def not_finite(rank: int) -> Iterator[None]:
    """Put a NaN into one rank's shard of a gradient when it has been reduced."""
    reduce = sharding.Shards.reduce

    def spoilt(shards: sharding.Shards, *given: Any) -> bool:
        summed = reduce(shards, *given)
        if dist.get_rank() == rank:
            shards.release()
            gradient: Any = next(p.grad for p in shards.module.parameters() if p.grad is not None)
            gradient.to_local()[0] = float("nan")
        return summed

    with mock.patch.object(sharding.Shards, "reduce", spoilt):
        yield


def adapter_after_sharding() -> str:
    backend = many()
    model: Any = backend.model
    try:
        torch.manual_seed(0)
        model.model = add_lora(model.model, 4)
        TorchBackend(model, reshard=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def without_all_reduce() -> str:
    """Replicas of shards that never exchange what they have found: the error that notices it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    backend = TorchBackend(MODELS["full"](), mesh=mesh, reshard=False)
    model: Any = backend.model
    sync = model.set_requires_gradient_sync  # which asks for the all-reduce too
    model.set_requires_gradient_sync = lambda asked: (sync(asked), model.set_requires_all_reduce(False))
    try:
        backend.forward_backward(batch(), "grpo").result()
    except PullbackError as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def main(target: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_world_size() == 4:
        found: dict[str, Any] = {"without all-reduce": without_all_reduce()}
    else:
        found = {name: distances(*planted) for name, planted in DEFECTS.items()}
        found |= {f"missing {name}": distances("grpo", UNEVEN, missing_reduction(name)) for name in names()}
        found |= {**refused(), "adapter after sharding": adapter_after_sharding()}
    Path(f"{target}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
