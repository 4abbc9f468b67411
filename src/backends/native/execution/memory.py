"""What a graph holds, and how much there is to hold it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

__all__ = ["GraphMeter", "available_bytes", "ran_out", "room_for_graphs"]


@final
@dataclass(eq=False)
class GraphMeter:
    """Measures what autograd keeps for a backward: unique storages, parameters left out.

    Counting tensors instead would count every view and every parameter: about three times too much.

    Attributes:
        owned: storages of the model itself.
        bytes_per_token: of the graph last measured; None before the first.
    """

    owned: frozenset[int]
    bytes_per_token: float | None = None
    _held: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> GraphMeter:
        """Return a meter for graphs through this model."""
        tensors = [*module.parameters(), *module.buffers()]
        return cls(frozenset(t.untyped_storage().data_ptr() for t in tensors if t.layout == torch.strided))

    @contextmanager
    def measuring(self, tokens: int) -> Iterator[None]:
        """Measure the graph that is built inside, of a forward of so many tokens."""
        self._held = {}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        self.bytes_per_token = self.bytes / max(tokens, 1)

    @property
    def bytes(self) -> int:
        """Size of the graph last measured."""
        return sum(self._held.values())

    def predict(self, tokens: int) -> float:
        """Bytes that the graph of a forward of so many tokens will hold; 0 before the first was measured."""
        return (self.bytes_per_token or 0.0) * tokens

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.owned:
                self._held[storage.data_ptr()] = storage.nbytes()
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


def available_bytes(device: torch.device) -> float:
    """Memory that is free for this process on a device now: what its allocator keeps unused, and what the system can give."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + reserved)
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return float(lines["MemAvailable"].split()[0]) * 1024 + _kept_by_malloc()
    except (OSError, KeyError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def _kept_by_malloc() -> int:
    """Bytes that were freed in this process and that glibc has kept for it: gigabytes, after the first large batch."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:  # another C library, or glibc before 2.33
        return 0
    mallinfo.restype = _Mallinfo2
    return int(mallinfo().fordblks)


def room_for_graphs(device: torch.device) -> float:
    """Half of what is free: the rest is for the backward and for others."""
    return available_bytes(device) / 2


def ran_out(error: RuntimeError) -> bool:
    """Whether this is what a device, or PyTorch's allocator on a CPU, raises when there is no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
