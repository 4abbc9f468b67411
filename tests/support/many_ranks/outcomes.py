"""What became of an operation on several processes, and how far two runs are apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from many_ranks.failing_cases import DATA, NEXT, PARAMS
from torch import Tensor

from pullback.backends import TorchBackend

__all__ = ["Outcome", "difference", "train", "tried", "weights"]

Outcome = dict[str, Any]


def tried(work: Callable[[], Any]) -> Outcome:
    """Return the error of an operation, and how long it took."""
    began = time.monotonic()
    try:
        done = work()
        error = done.exception() if hasattr(done, "exception") else None
    except Exception as raised:
        error = raised
    return {"type": type(error).__name__, "words": str(error), "seconds": time.monotonic() - began}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def weights(backend: TorchBackend) -> dict[str, Tensor]:
    held = {name: p.detach() for name, p in backend._native.parameters.items()}
    return {name: p.full_tensor().clone() if hasattr(p, "full_tensor") else p.clone() for name, p in held.items()}


def train(backend: TorchBackend, steps: range) -> None:
    for step in steps:
        backend.forward_backward(DATA if step % 2 else NEXT, "ppo").result()
        backend.optim_step(PARAMS).result()
