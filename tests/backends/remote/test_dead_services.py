"""A service that is gone is called gone, and what waits for it can always stop waiting."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from clients.hurried import impatient
from helpers import make_data
from servers import KEY, SDK_WARNINGS, tiny_models

import pullback
from pullback.backends import AdamParams, RemoteBackend, TorchBackend
from pullback.backends.remote.connection import liveness
from pullback.backends.remote.connection.futures import Sent
from pullback.backends.remote.connection.liveness import Liveness
from pullback.backends.remote.sdk.sdks import TinkerSdk
from pullback.errors import ClosedError, RemoteError, UnretrievedFailureError
from pullback.service import serving
from pullback.service.limits import Limits
from pullback.testing.network.faults import misbehaving

pytestmark = SDK_WARNINGS
DATA = make_data([6, 5])
GONE = r"no answer from http://127\.0\.0\.1:\d+ for \d+\.\d s"


@pytest.fixture(autouse=True)
def given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed backend gives a silent service up soon; one that answers has as long as the machine needs."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setattr(liveness, "_EVERY", 0.1)
    monkeypatch.setattr(liveness, "_DEAD", 0.3)
    monkeypatch.setattr(liveness, "_QUESTION", 30.0)


class Place:
    """A service behind an address that can die."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.url = stack.enter_context(serving(tiny_models(folder), keys=[KEY], limits=Limits(poll_seconds=0.2)))
        self.address = stack.enter_context(ExitStack())
        self.proxy = self.address.enter_context(misbehaving(self.url))

    def connect(self, **options: Any) -> RemoteBackend:
        return pullback.connect(self.proxy.url, base_model="tiny", rank=2, api_key=KEY, **options)

    def die(self) -> None:
        self.address.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack, tmp_path)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The service's gradient operations wait for this event."""
    gate, original = threading.Event(), TorchBackend.forward_backward

    def waiting(*given: Any, **options: Any) -> Any:
        gate.wait(120)
        return original(*given, **options)

    monkeypatch.setattr(TorchBackend, "forward_backward", waiting)
    yield gate
    gate.set()


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [None, 0.3], ids=["by default", "timeout="])
def test_closing_when_the_service_has_gone(place: Place, timeout: float | None) -> None:
    """An error in words while the SDK still calls; afterwards the backend is closed, and closing again says nothing."""
    backend = place.connect()
    backend.forward_backward(DATA, "ppo").result()
    place.die()
    with pytest.raises(RemoteError, match=rf"close: {GONE}; the session was not ended"):
        backend.close(timeout)
    assert any(thread.name == "pullback-close" for thread in threading.enumerate())
    backend.close(timeout)
    with pytest.raises(ClosedError):
        backend.forward(DATA)


@pytest.mark.parametrize("timeout", [None, 0.2], ids=["by default", "timeout="])
def test_closing_when_the_sdk_does_not(place: Place, monkeypatch: pytest.MonkeyPatch, timeout: float | None) -> None:
    """An SDK that never closes its client is not waited for for ever, though the service answers."""
    monkeypatch.setattr(liveness, "_ENDING", 0.2)
    backend, original, never = place.connect(), TinkerSdk.close, threading.Event()
    monkeypatch.setattr(TinkerSdk, "close", lambda *_: never.wait(120))
    with pytest.raises(RemoteError, match=r"the service answers, but the SDK has not closed its client in 0\.2"):
        backend.close(timeout)
    never.set()
    original(TinkerSdk(), backend._service, None)


def test_closing_with_an_operation_under_way(place: Place, held: threading.Event) -> None:
    """Its fate is not known, and that is what is said."""
    backend = place.connect()
    future = backend.forward_backward(DATA, "ppo")
    place.die()
    with pytest.raises(
        RemoteError, match=rf"close: {GONE}: forward_backward was sent .* not known whether it took effect"
    ):
        backend.close(0.3)
    assert not future.done()


@pytest.mark.slow
def test_closing_within_a_time_limit_while_the_service_works(place: Place, held: threading.Event) -> None:
    """Negative control: a service that works is not called dead; without a limit closing waits for it, and finds its end."""
    first, second = place.connect(), place.connect()
    futures = [backend.forward_backward(DATA, "ppo") for backend in (first, second)]
    with pytest.raises(RemoteError, match=r"is (running|queued)"):
        first.close(0.3)
    threading.Timer(1.0, held.set).start()  # longer than a silent service would be waited for
    second.close()
    assert [future.done() for future in futures] == [True, True]


@pytest.mark.slow
def test_a_with_block(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """At its end the error is raised; one that is on its way out already is not replaced."""
    first, second = place.connect(), place.connect()
    place.die()
    with pytest.raises(RemoteError, match="the session was not ended"), first:
        pass
    with caplog.at_level(logging.WARNING), pytest.raises(KeyError, match="mine"), second:
        raise KeyError("mine")
    assert "could not be given back: close: no answer from" in caplog.text


def test_an_unread_failure_comes_first(place: Place) -> None:
    """What nobody has read is worth more than that the session was not ended."""
    backend = place.connect()
    backend.forward_backward(DATA, "pqo")
    place.die()
    with pytest.raises(UnretrievedFailureError, match="pqo"):
        backend.close(0.3)


def test_a_dead_service_is_not_running(place: Place, held: threading.Event) -> None:
    """A result that is late says whether the service is there; when it is back, the same future has its answer."""
    backend = place.connect()
    future = backend.forward_backward(DATA, "ppo")
    with pytest.raises(TimeoutError, match="is running at the service"):
        future.result(timeout=0.2)
    place.die()
    with pytest.raises(TimeoutError, match=f"{GONE}: forward_backward was sent") as caught:
        future.result(timeout=0.2)
    assert "running" not in str(caught.value)
    with pytest.raises(RemoteError):
        backend.close(0.2)


@pytest.mark.slow
def test_calls_that_wait_inside(place: Place) -> None:
    """Making a sampler, loading, and the reference say it too, within the backend's time limit."""
    backend = place.connect()
    path = backend.save_state("one").result().path
    place.die()
    prompts = [pullback.ModelInput.from_ints([1])]
    for call in (
        lambda: backend.load_state(path).result(),
        lambda: backend.sample(prompts, 1, pullback.SamplingParams(max_tokens=1)).result(),
    ):
        with impatient(backend, 1.0), pytest.raises(TimeoutError, match=GONE):
            call()
    with pytest.raises(RemoteError):
        backend.close(0.2)


def test_a_cancelled_await(place: Place, held: threading.Event) -> None:
    """It ends at once, leaves no thread that waits, and the operation and the backend as they are."""
    backend = place.connect()

    async def hasty() -> None:
        future = backend.forward_backward(DATA, "ppo")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await future
        task = asyncio.create_task(backend.forward(DATA)._awaited())  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.get_running_loop()._default_executor is None  # type: ignore[attr-defined]
        held.set()
        assert (await future).metrics["loss:sum"] == future.result().metrics["loss:sum"]
        await backend.optim_step(AdamParams(learning_rate=1e-3))

    asyncio.run(hasty())
    assert backend.forward(DATA).result().metrics
    backend.close()


def test_an_await_whose_loop_has_ended() -> None:
    """The answer that comes later wakes nobody, and is not lost."""
    sent: Future[int] = Future()
    future = Sent([sent], sum).future("forward")

    async def once() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_wrapped(future), 0.01)

    asyncio.run(once())
    sent.set_result(3)
    assert future.result() == 3


async def _wrapped(future: Any) -> Any:
    return await future


def test_an_awaits_deadline() -> None:
    """The backend's `timeout` bounds an `await` as it bounds `result`."""
    future = Sent([Future[int]()], sum, deadline=0.01).future("forward")

    async def once() -> Any:
        return await future

    with pytest.raises(TimeoutError, match=r"forward was sent .* is running"):
        asyncio.run(once())


@pytest.mark.parametrize("read", [lambda future: future.result(), lambda future: asyncio.run(_wrapped(future))])
def test_an_operation_that_timed_out_over_there(read: Callable[[Any], Any]) -> None:
    """An answer that is a TimeoutError is the operation's end, and not a wait that was too short."""
    sent: Future[int] = Future()
    sent.set_exception(TimeoutError("over there"))
    future = Sent([sent], sum).future("forward")
    with pytest.raises(RemoteError, match="TimeoutError: over there"):
        read(future)


def test_nobody_is_asked_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service whose address is not known is never called silent."""
    monkeypatch.setattr(liveness, "alive", lambda *_: pytest.fail("asked"))
    assert Liveness(None).silence() == 0.0


def test_idle_seconds_are_no_missed_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service is gone a while after the first question that it leaves unanswered, however long nobody had asked before."""
    now = 0.0
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(liveness, "_DEAD", 10.0)
    service = Liveness("http://127.0.0.1:1")
    for answers, pause, gone in [(True, 100, False), (False, 100, False), (False, 9, False), (False, 2, True)] * 2:
        now += pause
        monkeypatch.setattr(liveness, "alive", lambda *_, answers=answers: answers)
        assert service.gone() is gone
    assert service.silence() == 111.0  # since it was heard
