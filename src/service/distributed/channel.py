"""What the first process tells the others to do."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Self, final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["STOP", "Channel", "Command", "ForwardHandles"]

# Those that follow wait so long: a service may have nothing to do for long. If the first process dies, they notice at once.
_IDLE: Final = timedelta(days=3650)


@final
@dataclass(frozen=True)
class ForwardHandles:
    """Retained forwards among the arguments of a command, by number; every process keeps its own part of each."""

    places: Mapping[int, Sequence[int]]


@final
class _Pickler(pickle.Pickler):
    """Writes plain tensors as their bytes: torch writes a file for each, which takes twenty times as long."""

    def reducer_override(self, value: Any) -> Any:
        """Say how a value is made again; `NotImplemented`: in its own way."""
        plain = type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.requires_grad or value.is_conj() or value.is_neg():
            return NotImplemented
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _tensor, (raw, value.dtype, tuple(value.shape))


def _tensor(raw: bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


@final
@dataclass(frozen=True)
class Command:
    """One call that every process makes.

    Attributes:
        name: of the method.
        model: whose.
        args, kwargs: of the call.
        handle: the number under which a forward that the call retains is kept.
        dropped: numbers of forwards that are of no more use.
    """

    name: str
    model: str = ""
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    handle: int = 0
    dropped: Sequence[int] = ()

    @property
    def title(self) -> str:
        """What errors call it."""
        return f"{self.name} of {self.model}"

    def to_bytes(self) -> bytes:
        """Return it as the channel carries it, between processes of one job."""
        written = io.BytesIO()
        _Pickler(written).dump(self)
        return written.getvalue()

    @classmethod
    def of(cls, raw: bytes) -> Self:
        """Read what `to_bytes` wrote."""
        command: Self = pickle.loads(raw)
        return command


STOP: Final = Command("stop")


@final
class Channel:
    """Carries commands from the first process to all others, in one order.

    It has a process group of its own, in which waiting for the next command never times out; sending one does, because all
    other processes are there to take it.

    Args:
        mesh: of the processes; every one must make its channel.
        timeout: seconds that sending a command may take; None: PyTorch's default.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float | None) -> None:
        members = sorted(mesh.mesh.flatten().tolist())
        limit = None if timeout is None else timedelta(seconds=timeout)
        own = limit if dist.get_rank() == members[0] else _IDLE  # each process's own; they need not be the same
        made = dist.new_group(members, timeout=own, backend="gloo")
        assert made is not None
        self._group = made

    def send(self, raw: bytes) -> None:
        """Send a command; the first process does.

        Raises:
            RuntimeError: a process is not there any more, or has not taken it in time.
        """
        self._broadcast(torch.tensor([len(raw)]))
        self._broadcast(torch.frombuffer(bytearray(raw), dtype=torch.uint8))

    def receive(self) -> bytes:
        """Wait for the next command, as long as it takes; all other processes do.

        Raises:
            RuntimeError: the first process is not there any more.
        """
        size = torch.zeros(1, dtype=torch.int64)
        self._broadcast(size)
        raw = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(raw)
        return raw.numpy().tobytes()

    def _broadcast(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, group_src=0, group=self._group)
