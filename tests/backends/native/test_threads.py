"""Operations from several threads run one at a time: what one switches for a while, no other sees."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from helpers import make_data, tiny_llama
from torch import Tensor

from pullback.backends import TorchBackend

DATA = make_data([12, 9, 7, 5])


def scores(backend: Any) -> list[Tensor]:
    return [one["logprobs"].to_torch() for one in backend.forward(DATA).result().loss_fn_outputs]


def worst(backend: TorchBackend) -> float:
    """The largest difference of the policy's log-probs while another thread scores the reference."""
    expected, stop, reference = scores(backend), threading.Event(), backend.reference()

    def score() -> None:
        while not stop.is_set():
            scores(reference)

    thread = threading.Thread(target=score)
    thread.start()
    try:
        seen = [scores(backend) for _ in range(30)]
    finally:
        stop.set()
        thread.join()
    return max(float((x - y).abs().max()) for found in seen for x, y in zip(found, expected, strict=True))


def test_the_reference_in_another_thread() -> None:
    """It never switches the policy's adapter off."""
    assert worst(TorchBackend(tiny_llama(torch.float32, lora=4))) < 1e-4


def test_without_the_lock_it_would() -> None:
    """Negative control."""
    backend = TorchBackend(tiny_llama(torch.float32, lora=4))
    backend._operations.one_at_a_time = contextlib.nullcontext()  # type: ignore[assignment]  # no lock at all
    assert any(worst(backend) > 1e-2 for _ in range(5))
