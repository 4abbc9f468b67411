"""A step that failed at a service: no later one is made on what it may have left there, until a checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
import tinker
import torch
from helpers import make_data
from servers import SDK_WARNINGS, adapter, served

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.remote import RemoteBackend
from pullback.errors import BackendError, RemoteError
from pullback.losses import GRPO

pytestmark = SDK_WARNINGS
FIRST, SECOND = make_data([6, 5]), make_data([7, 4], seed=1)
PARAMS = AdamParams(learning_rate=1e-2, eps=1e-3)
WAYS: dict[str, Any] = {
    "by name": lambda backend, data: backend.forward_backward(data, "cross_entropy", {"aggregation": "token_mean"}),
    "counted here": lambda backend, data: backend.forward_backward_custom(data, GRPO(aggregation="token_mean")),
}


def fails_there(backend: RemoteBackend, patch: pytest.MonkeyPatch) -> None:
    """The service's own step raises once; it says so."""

    def failing(*_: Any, **__: Any) -> Any:
        patch.undo()
        raise RuntimeError("pretended")

    patch.setattr(TorchBackend, "optim_step", failing)


def loses_its_answer(backend: RemoteBackend, patch: pytest.MonkeyPatch) -> None:
    """The step is sent, and nobody hears of it again."""
    trainer, lost = backend.trainer, Future[Any]()
    lost.set_exception(tinker.APIConnectionError(request=httpx.Request("POST", "http://127.0.0.1")))

    class Deaf:
        def optim_step(self, *_: Any) -> Any:
            backend._remote.trainer = trainer
            return lost

    backend._remote.trainer = Deaf()


def is_refused_here(backend: RemoteBackend, patch: pytest.MonkeyPatch) -> None:
    """The SDK does not send it."""
    trainer = backend.trainer

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(trainer, name)

        def optim_step(self, *_: Any) -> Any:
            backend._remote.trainer = trainer
            raise tinker.TinkerError("pretended")

    backend._remote.trainer = Refusing()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "retrieved", "way"),
    [
        (fails_there, True, "by name"),
        (fails_there, False, "counted here"),
        (loses_its_answer, False, "by name"),
        (is_refused_here, True, "counted here"),
    ],
)
def test_nothing_is_stepped_on_twice(
    fault: Callable[..., None], retrieved: bool, way: str, connect: Callable[..., RemoteBackend], models: Any
) -> None:
    """Neither the retry nor a step on the next data uses the gradient of the one that failed; a load brings all back."""
    backend, plain = connect(), connect()
    for each in (backend, plain):
        WAYS[way](each, SECOND).result()
        assert each.optim_step(PARAMS).result().stepped
    path = backend.save_state("before").result().path
    WAYS[way](backend, FIRST).result()
    with pytest.MonkeyPatch.context() as patch:
        fault(backend, patch)
        failed = backend.optim_step(PARAMS)
        if retrieved:
            assert failed.exception() is not None
        with pytest.raises(BackendError, match="load the last checkpoint"):
            backend.optim_step(PARAMS).result()
    with pytest.raises(BackendError, match="load the last checkpoint"):
        WAYS[way](backend, SECOND).result()
    assert isinstance(failed.exception(), (RemoteError, BackendError))
    backend.load_state_with_optimizer(path).result()
    for each in (backend, plain):
        WAYS[way](each, SECOND).result()
        assert each.optim_step(PARAMS).result().stepped
    found, wanted = (adapter(served(models, each.trainer)) for each in (backend, plain))
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_steps_that_succeed_are_not_waited_for(connect: Callable[..., RemoteBackend]) -> None:
    """Calls after a step are sent before its answer is here, and the step after them is an ordinary one."""
    backend = connect()
    for data in (FIRST, SECOND, FIRST):
        backend.forward_backward(data, "ppo")
        step = backend.optim_step(PARAMS)
    assert step.result().stepped
    assert not backend.optim_step(PARAMS).result().stepped
