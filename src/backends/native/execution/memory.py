"""What autograd graphs hold, how much memory there is for them, and less of it once memory has run out."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, TypeVar, final

import torch
from torch import Tensor, nn

from ....errors import BackendError, ConfigError, UnsupportedError
from ..dtensors import local_part
from ..models.facts.quantized import plain_tensors
from .batching import Layout, MicroBatch

__all__ = [
    "GraphMeter",
    "GraphSettings",
    "MemoryBudget",
    "Overflow",
    "available_bytes",
    "graph_allowance",
    "is_out_of_memory",
]

Overflow = Literal["recompute", "offload"]
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


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
        tensors = [plain for t in (*module.parameters(), *module.buffers()) for plain in plain_tensors(local_part(t))]
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

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        for plain in plain_tensors(tensor):
            if plain.layout == torch.strided:
                storage = plain.untyped_storage()
                if storage.data_ptr() not in self.owned:
                    self._held[storage.data_ptr()] = storage.nbytes()
        return tensor, _version(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """Return what a graph has kept, as it was: autograd leaves that check to hooks, where there are any."""
    tensor, version = packed
    if _version(tensor) != version:
        raise BackendError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs, e.g. a weight, was changed in place since "
            "the forward: the gradient would be of neither the old nor the new weights; step or load only when no forward waits"
        )
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


def graph_allowance(device: torch.device) -> float:
    """Return half of what is free: the rest is for the backward and for others."""
    return available_bytes(device) / 2


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is what a device, or PyTorch's allocator on a CPU, raises when there is no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


@final
@dataclass(frozen=True, eq=False)
class GraphSettings:
    """How the graphs of a call are retained.

    Attributes:
        layout: of a micro-batch's rows.
        budget: bytes that the graphs may hold together.
        overflow: what happens to those beyond: run again before their backward, or moved to CPU memory.
        meter: measures them.
        bytes_per_token: of a graph, as all processes have agreed, where each must retain the same; None: as measured.
        standing_in: surrounds the backward of a forward that stands for no datum.
    """

    layout: Layout
    budget: float
    overflow: Overflow
    meter: GraphMeter
    bytes_per_token: float | None = None
    standing_in: Callable[[], AbstractContextManager[None]] = nullcontext

    def predict(self, batch: MicroBatch) -> float:
        """Bytes that the graph of a forward will hold."""
        if self.bytes_per_token is None:
            return self.meter.predict(batch.tokens)
        return self.bytes_per_token * max(batch.tokens, batch.most_tokens)


@final
@dataclass(eq=False)
class MemoryBudget:
    """The two sizes that memory depends on, and the result never.

    Attributes:
        tokens: of one forward, padding included.
        graphs: bytes that the graphs of one call may hold together; None: half of what is free.
        overflow: what happens to graphs beyond it.
        meter: measures graphs.
        device: of the model.
        agreed: makes one number of that of all processes that must retain the same graphs.

    Raises:
        ConfigError: a size is out of range, or graphs would be moved to where they are.
    """

    tokens: int
    graphs: float | None
    overflow: Overflow
    meter: GraphMeter
    device: torch.device
    agreed: Callable[[float], float] = lambda number: number

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"token_budget must be at least 1 token, got {self.tokens}")
        if self.graphs is not None and not self.graphs >= 0:
            raise ConfigError(f"activation_budget must be a number of bytes, got {self.graphs!r}")
        if self.overflow not in ("recompute", "offload"):
            raise ConfigError(f"overflow must be recompute or offload, got {self.overflow!r}")
        if self.overflow == "offload" and self.device.type == "cpu":
            raise ConfigError("overflow='offload' moves graphs to CPU memory, where this model's already are; drop it")

    def settings(self, layout: Layout) -> GraphSettings:
        """Return how graphs are retained now."""
        budget = graph_allowance(self.device) if self.graphs is None else self.graphs
        return GraphSettings(layout, budget, self.overflow, self.meter)

    def retry(self, attempt: Callable[[], _T], lengths: Sequence[int]) -> _T:
        """Run an attempt; where memory runs out, retry in smaller forwards and with fewer graphs.

        Args:
            attempt: changes nothing if it fails, and asks for the sizes anew.
            lengths: of the sequences, tokens.

        Raises:
            UnsupportedError: one sequence alone does not fit.
        """
        longest = max(lengths)
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                told = str(error).partition("\n")[0]
                if self.tokens <= longest and self.graphs == 0:
                    raise UnsupportedError(
                        f"a datum of {longest} tokens does not fit into memory even alone ({told}); "
                        "use gradient_checkpointing=True, a smaller model or dtype, or shorter sequences"
                    ) from error
            self._shrink(longest, sum(lengths))

    def _shrink(self, longest: int, together: int) -> None:
        """Halve the forwards, and the graphs that wait, down to one."""
        self.tokens = max(longest, min(self.tokens, together) // 2)
        half = min(self.settings("single").budget, self.meter.predict(together)) / 2
        self.graphs = self.agreed(half if half > self.meter.predict(self.tokens) else 0.0)
        _logger.warning("out of memory: token_budget is now %d, activation_budget %.0f bytes", self.tokens, self.graphs)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
