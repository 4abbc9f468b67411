"""Failures after which the group of processes is lost, and the new start from the last checkpoint."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from many_ranks.failing_cases import DATA, PARAMS, SECONDS, make, summed
from many_ranks.outcomes import Outcome, difference, train, tried, weights
from torch import Tensor

from pullback.backends import TorchBackend
from pullback.backends.native.dtensors import local_part

__all__ = ["ALONE", "alone", "resumed"]


def stalled(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    if dist.get_rank() == 1:
        time.sleep(2 * SECONDS)
    return summed(data, logprobs)


def killed(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return summed(data, logprobs)


def in_a_layer(backend: TorchBackend, error: Exception) -> Any:
    """Rank 1 fails between two layers."""

    def fail(*_: Any) -> None:
        raise error

    block = backend.model.get_submodule("blocks.1")
    handle = block.register_forward_pre_hook(fail) if dist.get_rank() == 1 else None
    try:
        return backend.forward_backward(DATA, "ppo")
    finally:
        if handle is not None:
            handle.remove()


@dataclass(frozen=True)
class Alone:
    """A failure after which the group is lost.

    Attributes:
        fail: the operation.
        options: of the backend.
    """

    fail: Callable[[TorchBackend], Any]
    options: Mapping[str, Any]


ALONE: Final[dict[str, Alone]] = {
    "stall": Alone(lambda b: b.forward_backward_custom(DATA, stalled), {"reshard": False}),
    "kill": Alone(lambda b: b.forward_backward_custom(DATA, killed), {"reshard": False}),
    "layer": Alone(lambda b: in_a_layer(b, ValueError("in the second layer")), {"reshard": True}),
    "layer, no memory": Alone(lambda b: in_a_layer(b, torch.OutOfMemoryError("planted")), {"reshard": True}),
}


def alone(name: str, folder: Path) -> Outcome:
    """Train two steps, save, and fail in the third."""
    backend = make(folder, timeout=SECONDS, **ALONE[name].options)
    train(backend, range(2))
    backend.forward_backward(DATA, "ppo").result()
    backend.save_state("last").result()
    held = {name: local_part(g).clone() for name, g in backend._native.gradients().items()}
    told = tried(lambda: ALONE[name].fail(backend))
    left = {name: local_part(g) for name, g in backend._native.gradients().items()}
    told["moved"] = difference(left, held)
    again: list[Callable[[], Any]] = [
        lambda: backend.forward(DATA),
        lambda: backend.save_state("more"),
        lambda: backend.optim_step(PARAMS),
        backend.gradients,
    ]
    return told | {"later": [tried(work) for work in again]}


def resumed(folder: Path) -> Outcome:
    """Load what was saved before the failure, go on, and compare with a run that nothing has interrupted."""
    ends = []
    for again in (True, False):
        backend = make(folder)
        if again:
            backend.load_state_with_optimizer(folder / "last").result()
        else:
            train(backend, range(2))
            backend.forward_backward(DATA, "ppo").result()
        backend.forward_backward_custom(DATA, summed).result()
        backend.optim_step(PARAMS).result()
        train(backend, range(2, 4))
        ends.append(weights(backend))
    return {"apart": difference(*ends)}
