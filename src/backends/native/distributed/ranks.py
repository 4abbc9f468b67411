"""The processes that train one model together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ....errors import ConfigError
from .environment import process_count

__all__ = ["Ranks", "find_mesh", "require_timeout"]

_LONGEST: Final = 10 * 365 * 86400  # seconds


def find_mesh(
    asked: DeviceMesh | Literal["auto"] | None, device: torch.device, timeout: float | None
) -> DeviceMesh | None:
    """Return the mesh that a model is spread over; None: it stays in this process.

    Args:
        asked: a mesh of one dimension (shards) or two (replicas of shards); ``auto``: all processes that ``torchrun`` started,
            or that a process group holds already; None: this process alone.
        device: of the model.
        timeout: seconds that a process waits for the others, where the process group is made here.

    Raises:
        ConfigError: the mesh has more dimensions, the timeout is none, or no process group can be made.
    """
    require_timeout(timeout)
    if asked is None:
        return None
    if isinstance(asked, DeviceMesh):
        if asked.ndim > 2:
            raise ConfigError(f"mesh must have one dimension (shards) or two (replicas, shards), got {asked.ndim}")
        if asked.ndim == 2 and asked.mesh_dim_names is None:
            raise ConfigError("a mesh of two dimensions needs names: mesh_dim_names=('replicas', 'shards')")
        return asked if asked.size() > 1 else None
    if asked != "auto":
        raise ConfigError(f"mesh must be auto, None or a torch DeviceMesh, got {asked!r}")
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        if process_count() == 1:
            return None
        _initialize(device, timeout)
    return init_device_mesh(device.type, (dist.get_world_size(),)) if dist.get_world_size() > 1 else None


def require_timeout(timeout: float | None, name: str = "timeout") -> None:
    """Check that processes can wait for each other so long; None: PyTorch's default.

    Raises:
        ConfigError: they cannot.
    """
    if timeout is not None and not 0 < timeout <= _LONGEST:
        raise ConfigError(f"{name} must be seconds above 0, {_LONGEST} at most, got {timeout:g}")


def _initialize(device: torch.device, timeout: float | None) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    store, rank, size = next(dist.rendezvous("env://", **limit))  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=_of_this_start(store), rank=rank, world_size=size, **limit)


def _of_this_start(store: Any) -> Any:
    """Return a store without the addresses of processes that have ended: torchrun's outlives them when it starts them again."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]


_GROUPS: Final[dict[tuple[tuple[int, ...], float | None], dist.ProcessGroup]] = {}


def _gloo(members: tuple[int, ...], timeout: float | None) -> dist.ProcessGroup:
    """Return a group of these processes, of which one serves all models: each has its own threads and connections."""
    found = _GROUPS.get((members, timeout))
    if found is None or not _alive(found):
        limit = None if timeout is None else timedelta(seconds=timeout)
        made = dist.new_group(list(members), timeout=limit, backend="gloo")
        assert made is not None
        found = _GROUPS[members, timeout] = made
    return found


def _alive(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):  # destroyed
        return False
    return True


@final
@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among those of a mesh.

    Attributes:
        rank: this process, counted from 0.
        size: how many there are.
        group: of all of them, on the CPU; apart from the one that moves weights, whose order it must not disturb.
    """

    rank: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, mesh: DeviceMesh, timeout: float | None) -> Ranks:
        """Make the group that the processes of a mesh agree in; every one must call this.

        Args:
            mesh: of the model.
            timeout: seconds that a process waits for the others; None: PyTorch's default.
        """
        members = sorted(mesh.mesh.flatten().tolist())
        return cls(members.index(dist.get_rank()), len(members), _gloo(tuple(members), timeout))

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, which have one shape, stacked; on the CPU."""
        own = tensor.detach().cpu().contiguous()
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self.group)
        return torch.stack(every)

    def least(self, number: float) -> float:
        """Return the smallest of the ranks' numbers."""
        return float(self.gather(torch.tensor([number], dtype=torch.float64)).min())

    def gather_ragged(self, tensor: Tensor, sizes: list[int]) -> list[Tensor]:
        """Return the tensors of all ranks, whose first dimension has ``sizes[r]`` entries on rank r."""
        most = max(sizes)
        if most == 0:
            return [tensor.detach().cpu()] * self.size
        padded = tensor.new_zeros((most, *tensor.shape[1:]), device="cpu")
        padded[: len(tensor)] = tensor.detach().cpu()
        return [each[:size] for each, size in zip(self.gather(padded), sizes, strict=True)]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor; on the CPU."""
        given = tensor.detach().cpu().clone().contiguous()
        dist.broadcast(given, group_src=0, group=self.group)
        return given

    def broadcast_text(self, text: str) -> str:
        """Return rank 0's text, of at most 4,096 bytes."""
        raw = text.encode()[:4096].ljust(4096, b"\0")
        return (
            bytes(self.broadcast(torch.frombuffer(bytearray(raw), dtype=torch.uint8)).tolist()).rstrip(b"\0").decode()
        )
