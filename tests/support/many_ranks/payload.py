"""What a process receives from others through torch.distributed: bytes of tensors, whatever the transport adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Message", "Payload"]

_GATHER: Final = ("all_gather_single", "all_gather_into_tensor")  # the first since torch 2.13
_REDUCE: Final = ("reduce_scatter_single", "reduce_scatter_tensor")


class Message(NamedTuple):
    """One collective: its name, the dtype of its tensors, the bytes that this process receives, and in which group."""

    name: str
    dtype: torch.dtype
    received: float
    group: Any = None


@dataclass
class Payload:
    """Counts collectives while it is entered.

    Attributes:
        messages: those so far.
        head: the group that scores with one head; what it says in the middle of a pass counts for itself.
    """

    messages: list[Message] = field(default_factory=list)
    head: Any = None
    _before: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for name in (*_GATHER, *_REDUCE, "all_gather", "all_reduce", "broadcast"):
            if hasattr(dist, name):
                self._before[name] = getattr(dist, name)
                setattr(dist, name, self._counted(name, getattr(dist, name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, function in self._before.items():
            setattr(dist, name, function)

    def received(self, *names: str) -> float:
        """Bytes of the collectives of these names, but for those of the head."""
        return sum(message.received for message in self._others if message.name in names)

    @property
    def scored(self) -> float:
        """Bytes of the head: FSDP moves the weights of the same group by other collectives."""
        return sum(message.received for message in self.messages if self._is_head(message))

    @property
    def _others(self) -> list[Message]:
        return [message for message in self.messages if not self._is_head(message)]

    def _is_head(self, message: Message) -> bool:
        return self.head is not None and message.group is self.head and message.name not in (*_GATHER, *_REDUCE)

    @property
    def gathered(self) -> float:
        """Bytes of weights."""
        return self.received(*_GATHER)

    @property
    def reduced(self) -> float:
        """Bytes of gradients, within a group of shards."""
        return self.received(*_REDUCE)

    @property
    def replicated(self) -> float:
        """Bytes of gradients, between replicas."""
        return self.received("all_reduce")

    def told(self, *dtypes: torch.dtype) -> float:
        """Bytes that ranks tell each other beside weights and gradients, of these dtypes."""
        return sum(m.received for m in self._others if m.name in ("all_gather", "broadcast") and m.dtype in dtypes)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            size = dist.get_world_size(kwargs.get("group"))
            self.messages.append(Message(name, tensors[0].dtype, _received(name, tensors, size), kwargs.get("group")))
            return function(*args, **kwargs)

        return call


def _received(name: str, tensors: list[Tensor], size: int) -> float:
    each = [float(t.numel() * t.element_size()) for t in tensors]
    if (
        name in _GATHER or name in _REDUCE
    ):  # the whole is the larger of the two; a rank has one part, or gets its own from all
        return max(each) * (size - 1) / size
    if name == "all_gather":
        return each[0] * (size - 1)
    if name == "all_reduce":  # a reduction of parts, and a gathering of them
        return 2 * each[0] * (size - 1) / size
    return each[0] if dist.get_rank() else 0.0  # broadcast from rank 0
