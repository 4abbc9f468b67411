"""A call that an SDK cuts into several requests may fail in one of them: no step is made on the rest, which is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers import distance, make_data
from servers import SDK_WARNINGS, adapter, served, twin

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.remote import Capabilities, RemoteBackend
from pullback.backends.remote.sdk.convert import requests_of
from pullback.errors import BackendError, PrecedingOperationFailed, RemoteError

pytestmark = SDK_WARNINGS
FIRST, SECOND = make_data([6, 5]), make_data([7, 4], seed=1)
HALF_WRONG = [FIRST[0], FIRST[1].with_inputs(target_tokens=[99] * 5)]  # outside the vocabulary of the service
PARAMS = AdamParams(learning_rate=1e-2, eps=1e-2)


@pytest.fixture
def cutting(connect: Callable[..., RemoteBackend]) -> Callable[..., RemoteBackend]:
    """Connects with a client that sends each datum by itself; it is a thousand by default."""

    def make(**options: Any) -> RemoteBackend:
        backend = connect(**options)
        holder = backend.trainer.holder
        holder._client_config = holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 1})
        return backend

    return make


def require_lost(backend: RemoteBackend, path: str, models: Any) -> None:
    """Nothing but a load helps; the step after it is the native one."""
    for again in (lambda: backend.optim_step(PARAMS), lambda: backend.forward_backward(SECOND, "ppo")):
        with pytest.raises(BackendError, match=r"(?s)may hold a part of it .*load the last checkpoint"):
            again().result()
    backend.load_state_with_optimizer(path).result()
    native = twin(models, backend.trainer)
    for one in (native, backend):
        one.forward_backward(SECOND, "ppo").result()
        assert one.optim_step(PARAMS).result().stepped
    assert distance(adapter(served(models, backend.trainer)), adapter(native)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"capabilities": Capabilities()}])
@pytest.mark.parametrize("reads", [True, False])
def test_a_part_of_a_gradient_is_not_stepped_on(cutting: Any, models: Any, options: Any, reads: bool) -> None:
    """Whether its error is read before a step is tried or after."""
    backend = cutting(**options)
    path = backend.save_state("whole", overwrite=True).result().path
    failed = backend.forward_backward(HALF_WRONG, "ppo")
    if not reads:
        with pytest.raises(PrecedingOperationFailed, match="vocabulary"):
            backend.optim_step(PARAMS).result()
    with pytest.raises(RemoteError, match="vocabulary"):
        failed.result()
    require_lost(backend, path, models)


@pytest.mark.slow
def test_what_was_held_back_is_not_sent_twice_in_part(cutting: Any, models: Any, monkeypatch: Any) -> None:
    """A step whose second half failed at the service is not tried again: the first half is there."""
    backend, calls, original = cutting(defer_backward=True), [], TorchBackend.forward_backward
    path = backend.save_state("whole", overwrite=True).result().path
    backend.forward_backward(FIRST, "ppo").result()

    def failing(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("pretended")
        return original(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "forward_backward", failing)
        with pytest.raises(RemoteError, match="pretended"):
            backend.optim_step(PARAMS).result()
    with pytest.raises(BackendError, match="may hold a part of it"):
        backend.optim_step(PARAMS).result()
    backend.discard_gradients()
    require_lost(backend, path, models)


def test_a_part_that_is_taken_for_the_whole_is_noticed(cutting: Any, models: Any, monkeypatch: Any) -> None:
    """Negative control: what is left of the gradient goes into the next step."""
    monkeypatch.setattr("pullback.backends.remote.engine.requests_of", lambda trainer, data: 1)
    backend = cutting()
    native = twin(models, backend.trainer)
    assert backend.forward_backward(HALF_WRONG, "ppo").exception() is not None
    for one in (native, backend):
        one.forward_backward(SECOND, "ppo").result()
        one.optim_step(PARAMS).result()
    assert distance(adapter(served(models, backend.trainer)), adapter(native)) > 1e-3


def test_requests_of_a_call(cutting: Any, connect: Any) -> None:
    """As the SDK cuts it; a client that does not say may send each datum by itself."""
    for backend, wanted in ((cutting(), 2), (connect(), 1)):
        wire = backend._remote._sdk.datums(FIRST)
        assert requests_of(backend.trainer, wire) == wanted
        assert len(backend.trainer._chunked_requests(wire)) == wanted
    assert requests_of(object(), FIRST) == 2
