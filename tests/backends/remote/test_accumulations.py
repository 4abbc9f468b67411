"""What accumulates at a service, when it is saved, loaded, empty or interrupted: the native step, or a refusal in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import distance, make_data
from servers import SDK_WARNINGS, adapter, served, twin
from torch import Tensor

from pullback.backends import AdamParams, Backend
from pullback.backends.preserve import preserved
from pullback.backends.remote import Capabilities, RemoteBackend
from pullback.backends.remote.connection.futures import RemoteFuture
from pullback.datums import Datum
from pullback.errors import BackendError, PrecedingOperationFailed, UnsupportedError
from pullback.losses import GRPO

pytestmark = [*SDK_WARNINGS, pytest.mark.slow]
FIRST, SECOND = make_data([6, 5]), make_data([7, 4], seed=1)
PARAMS = AdamParams(learning_rate=1e-2, eps=1e-2)  # so that a gradient of another size makes another step
Connect = Callable[..., RemoteBackend]


def confidence(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.stack([x.exp().sum() for x in logprobs]).sum(), {}


WAYS: dict[str, Callable[[Any, Sequence[Datum]], Any]] = {
    "sum": lambda backend, data: backend.forward_backward(data, "ppo"),
    "mean": lambda backend, data: backend.forward_backward(data, "grpo"),
    "function": lambda backend, data: backend.forward_backward_custom(data, confidence),
    "counted here": lambda backend, data: backend.forward_backward_custom(data, GRPO()),
}


def resumed(backend: Any, path: str) -> None:
    """Load everything, whatever has accumulated."""
    if not isinstance(backend, RemoteBackend):
        backend.discard_gradients()
    backend.load_state_with_optimizer(path).result()


@pytest.mark.parametrize("way", ["sum", "mean", "function"])
@pytest.mark.parametrize("rest", [SECOND, None])
def test_gradients_come_back_with_a_checkpoint(
    connect: Connect, models: Any, way: str, rest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server that was asked to end, or of the SDK: the step after a load is the native one, and so is the next one."""
    monkeypatch.chdir(tmp_path)  # where the native backend saves
    remote = connect()
    native = twin(models, remote.trainer)
    steps = []
    for backend in (native, remote):
        WAYS[way](backend, FIRST).result()
        path = getattr(backend, "trainer", backend).save_state(f"half-{way}-{rest is None}").result().path
        WAYS[way](backend, FIRST).result()  # is forgotten
        resumed(backend, path)
        if rest is not None:
            WAYS[way](backend, rest).result()
        steps.append(backend.optim_step(PARAMS).result())
        WAYS[way](backend, SECOND).result()
        backend.optim_step(PARAMS).result()
    assert [step.stepped for step in steps] == [True, True]
    assert steps[0].metrics["grad_norm"] == pytest.approx(steps[1].metrics["grad_norm"], rel=1e-4)
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-5


def test_gradients_of_a_checkpoint_outlive_a_look(connect: Connect, models: Any) -> None:
    """What a tool only looks at is stepped on all the same, not left there for the step after."""
    saving, backend = connect(), connect(defer_backward=True)
    WAYS["sum"](saving, FIRST).result()
    backend.load_state_with_optimizer(saving.trainer.save_state("looked-at").result().path).result()
    with preserved(backend, weights=False):
        WAYS["sum"](backend, SECOND).result()
    for one in (saving, backend):
        assert one.optim_step(PARAMS).result().stepped
    assert distance(*(adapter(served(models, one.trainer)) for one in (saving, backend))) < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"defer_backward": True}, {"capabilities": Capabilities()}])
def test_what_a_checkpoint_would_lack(connect: Connect, options: dict[str, Any], way: str) -> None:
    """What is kept here of gradients is in no checkpoint: it is refused before anything is sent, and saved after the step."""
    backend = connect(**options)
    backend.save_state("empty", overwrite=True).result()
    WAYS[way](backend, FIRST).result()
    held = "the cotangents of 2 datums, and what divides" if "defer_backward" in options else "step: what divides"
    with pytest.raises(UnsupportedError, match=f"{held} .*; call optim_step first"):
        backend.save_state("half").result()
    assert backend.optim_step(PARAMS).result().stepped
    backend.save_state("whole", overwrite=True).result()


def test_a_checkpoint_that_would_lack_a_failed_gradient(connect: Connect) -> None:
    """Its error must have been read."""
    backend = connect()
    outside = [d.with_inputs(target_tokens=[99] * len(d.model_input)) for d in FIRST]
    failed = WAYS["sum"](backend, outside)
    with pytest.raises(PrecedingOperationFailed, match="vocabulary"):
        backend.save_state("half").result()
    assert failed.exception() is not None
    backend.save_state("without-it").result()


@pytest.mark.parametrize("empty", ["weights", "advantages"])
@pytest.mark.parametrize(("way", "then"), [("mean", "sum"), ("counted here", "mean"), ("function", "mean")])
def test_an_empty_step_leaves_nothing_behind(connect: Connect, models: Any, empty: str, way: str, then: str) -> None:
    """Neither at the service: a loss with another denominator comes next. No step is made, and none is counted."""
    remote = connect()
    native = twin(models, remote.trainer)
    nothing = [d.with_inputs(**{empty: [0.0] * len(d.model_input)}) for d in FIRST]
    for backend in (native, remote):
        sent = WAYS[way](backend, nothing) if way != "function" else backend.forward_backward_custom(FIRST, no_gradient)
        sent.result()
        assert not backend.optim_step(PARAMS).result().stepped
        assert backend.weights_version == 0
        WAYS[then](backend, SECOND).result()
        assert backend.optim_step(PARAMS).result().stepped
        assert backend.weights_version == 1
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-5


def no_gradient(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([x.sum() for x in logprobs]).sum() * 0.0, {}


def test_a_step_whose_only_gradient_failed_is_none(connect: Connect) -> None:
    """The error has been read: the step is allowed, has nothing to step on, and says so."""
    backend = connect()
    outside = [d.with_inputs(target_tokens=[99] * len(d.model_input)) for d in FIRST]
    assert WAYS["sum"](backend, outside).exception() is not None
    assert not backend.optim_step(PARAMS).result().stepped
    assert backend.weights_version == 0


def test_a_loss_that_fails_here_leaves_nothing_behind(connect: Connect, models: Any) -> None:
    """A mean may come after it, though the SDK has sent its gradient of nothing."""
    remote = connect()
    native = twin(models, remote.trainer)

    def broken(data: Any, logprobs: Any) -> Any:
        raise KeyError("mine")

    for backend in (native, remote):
        with pytest.raises(KeyError, match="mine"):
            backend.forward_backward_custom(FIRST, broken).result()
        WAYS["mean"](backend, SECOND).result()
        assert backend.optim_step(PARAMS).result().stepped
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-5


@contextmanager
def interrupting(operation: str) -> Iterator[None]:
    """Ctrl-C while somebody waits for the answer to an operation, which the service has carried out."""
    original = RemoteFuture.result

    def result(self: Any, timeout: float | None = None) -> Any:
        answer = original(self, timeout)
        if self._operation == operation:
            raise KeyboardInterrupt
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFuture, "result", result)
        yield


def _interrupted_gradient(backend: Backend) -> None:
    WAYS["function"](backend, FIRST)


def _interrupted_step(backend: Backend) -> None:
    backend.optim_step(PARAMS)


@pytest.mark.parametrize(
    ("options", "operation", "interrupted"),
    [
        ({}, "confidence", _interrupted_gradient),
        ({"defer_backward": True}, "forward_backward", _interrupted_step),
    ],
)
def test_an_interrupt_is_no_reason_to_send_again(
    connect: Connect, models: Any, options: dict[str, Any], operation: str, interrupted: Callable[[Any], None]
) -> None:
    """What was sent may be there: no step until a checkpoint has been loaded, whatever is discarded here."""
    remote, plain = connect(**options), connect(**options)
    path = remote.save_state("before").result().path
    for backend in (remote, plain):
        WAYS["sum"](backend, FIRST).result()
    with interrupting(operation), pytest.raises(KeyboardInterrupt):
        interrupted(remote)
    words = "was interrupted, so nobody knows"
    for again in (lambda: remote.optim_step(PARAMS), lambda: WAYS["sum"](remote, SECOND)):
        with pytest.raises(BackendError, match=words):
            again().result()
    with pytest.raises(BackendError, match=rf"{words}.*backend\.trainer\.save_state|KeyboardInterrupt"):
        remote.save_state("after").result()
    if options:
        remote.discard_gradients()
    with pytest.raises(BackendError, match=words):
        remote.optim_step(PARAMS).result()
    remote.load_state_with_optimizer(path).result()
    WAYS["sum"](remote, FIRST).result()
    for backend in (remote, plain):
        assert backend.optim_step(PARAMS).result().stepped
    assert distance(*(adapter(served(models, backend.trainer)) for backend in (remote, plain))) < 1e-5


def test_an_interrupt_before_anything_is_sent_spoils_nothing(connect: Connect) -> None:
    """Held back, a gradient's call has sent no more than a forward."""
    backend = connect(defer_backward=True)
    with interrupting("forward"), pytest.raises(KeyboardInterrupt):
        WAYS["sum"](backend, FIRST)
    backend.discard_gradients()
    WAYS["sum"](backend, FIRST).result()
    assert backend.optim_step(PARAMS).result().stepped
