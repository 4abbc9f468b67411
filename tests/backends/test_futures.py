"""Futures: awaitable, and an error that nobody retrieves is not lost."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest
import torch
from helpers import make_data, tiny_backend

from pullback.errors import ClosedError, UnknownLossError


def test_await() -> None:
    """An operation can be awaited, its error too."""

    async def both() -> float:
        backend = tiny_backend()
        output = await backend.forward(make_data([3, 4]))
        with pytest.raises(UnknownLossError):
            await backend.forward(make_data([3]), "nothing")
        return output.metrics["loss:sum"]

    assert asyncio.run(both()) > 0


def test_forgotten_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A future that dies with an unretrieved error says so in the log; one that was retrieved is silent."""
    backend = tiny_backend()
    with caplog.at_level(logging.ERROR):
        assert backend.forward([], "ppo").exception() is not None
        gc.collect()
        assert not caplog.records
        backend.forward([], "ppo")
        gc.collect()
    assert "nobody retrieved its error" in caplog.text
    assert "data is empty" in caplog.text


def test_closed_backend_refuses() -> None:
    """After close nothing runs, and closing twice is fine."""
    backend = tiny_backend()
    backend.close()
    backend.close()
    with pytest.raises(ClosedError, match="forward"):
        backend.forward(make_data([3]))
    with pytest.raises(ClosedError, match="plan on a backend that has been closed"):
        backend.plan("cross_entropy", make_data([3]))
    with pytest.raises(ClosedError, match="plan"):
        backend.plan(lambda data, logprobs: (logprobs[0].sum(), {}), make_data([3]))


def test_operations_run_in_the_callers_thread_and_modes() -> None:
    """Gradients are taken even under no_grad, and the caller's mode is left as it was."""
    backend = tiny_backend()
    with torch.no_grad():
        backend.forward_backward(make_data([3, 4]), "ppo").result()
        assert not torch.is_grad_enabled()
    assert backend.gradients()
    assert torch.is_grad_enabled()
