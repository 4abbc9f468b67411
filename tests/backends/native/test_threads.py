"""Operations from several threads run one at a time: what one switches for a while, no other sees."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import pytest
import torch
from helpers import make_data, tiny_llama, unweighted_nll
from torch import Tensor

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.calls import cotangents
from pullback.backends.operations.lock import OperationLock
from pullback.errors import BackendError
from pullback.losses import CrossEntropy
from pullback.losses.base import Loss

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


def test_without_the_lock_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(OperationLock, "operation", lambda *_: contextlib.nullcontext())
    backend = TorchBackend(tiny_llama(torch.float32, lora=4))
    assert any(worst(backend) > 1e-2 for _ in range(5))


@final
@dataclass(frozen=True)
class Scoring(Loss):
    """Cross-entropy that calls a function each time that it is computed."""

    call: Callable[[], Any]
    aggregation: str = "sum"

    name: ClassVar[str] = "scoring"
    gradient_kind: ClassVar[Any] = "sequence"
    sources: ClassVar[tuple[str, ...]] = ()
    required_inputs: ClassVar[tuple[str, ...]] = ()
    optional_inputs: ClassVar[tuple[str, ...]] = ("weights", "group_id")

    @classmethod
    def from_config(cls) -> Scoring:
        return cls(lambda: None)

    def terms(self, batch: Any) -> Any:
        self.call()
        return CrossEntropy().terms(batch)

    def describe(self, batch: Any) -> Mapping[str, Any]:
        return {}


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What the work returns; it fails rather than wait for ever."""
    found = list[Any]()
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"no end after {seconds} s"
    return found[0]


def elsewhere(work: Callable[[], Any]) -> Any:
    """What the work returns or raises in a thread of its own, which is waited for."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("registered", [False, True])
def test_a_loss_may_score_in_another_thread(registered: bool) -> None:
    """A loss that waits for a thread which scores gets what it would have had in its own, and the same gradient."""
    backend, seen = TorchBackend(tiny_llama(torch.float32, lora=4)), list[list[Tensor]]()
    reference, own = backend.reference(), scores(backend)
    expected = [own, scores(reference), own]
    pool = ThreadPoolExecutor(1)  # whose thread is there before the loss, as that of a program's own pool is
    assert pool.submit(lambda: True).result()

    def score() -> None:
        seen.append(elsewhere(lambda: scores(backend)))
        seen.append(pool.submit(lambda: scores(reference)).result())
        seen.append(scores(backend))

    def function(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        score()
        return unweighted_nll(data, logprobs)

    def work() -> Any:
        if registered:
            backend.forward(DATA, Scoring(score)).result()
            return backend.forward_backward(DATA, Scoring(score)).result()
        return backend.forward_backward_custom(DATA, function).result()

    within(60, work)
    assert len(seen) >= 3
    for number, found in enumerate(seen):
        assert all(torch.equal(x, y) for x, y in zip(found, expected[number % 3], strict=True))
    gradients = backend.gradients()
    backend.discard_gradients()
    if registered:
        backend.forward_backward(DATA, "cross_entropy").result()
    else:
        backend.forward_backward_custom(DATA, unweighted_nll).result()
    assert all(torch.allclose(g, gradients[name], atol=1e-6) for name, g in backend.gradients().items())


def test_a_loss_may_not_train_in_another_thread() -> None:
    """What changes the model is refused in a thread that the loss started, as it is in the loss's own."""
    backend = TorchBackend(tiny_llama(torch.float32, lora=4))
    verbs: list[Callable[[], Any]] = [
        lambda: backend.optim_step(AdamParams(learning_rate=1e-2)).result(),
        lambda: backend.forward_backward(DATA, "cross_entropy").result(),
        lambda: backend.discard_gradients(),
        lambda: backend.close(),
    ]
    for verb in verbs:

        def function(data: Sequence[Any], logprobs: Sequence[Tensor], verb: Any = verb) -> Any:
            elsewhere(verb)
            return unweighted_nll(data, logprobs)

        with pytest.raises(BackendError, match="a loss may score, but not train"):
            within(60, partial(backend.forward_backward_custom, DATA, function)).result()
    assert backend.gradients() == {}


def test_a_loss_that_is_not_marked_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the lock lent, the thread that scores waits for the loss, which waits for it."""
    monkeypatch.setattr(cotangents, "running_loss", contextlib.nullcontext)
    backend = TorchBackend(tiny_llama(torch.float32, lora=4))
    given_up = list[bool]()

    def function(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        thread = threading.Thread(target=lambda: scores(backend))
        thread.start()
        thread.join(0.5)
        given_up.append(thread.is_alive())
        return unweighted_nll(data, logprobs)

    within(60, lambda: backend.forward_backward_custom(DATA, function).result())
    assert given_up == [True]
