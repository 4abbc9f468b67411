"""Gradients that failed at a service: once that is known they are in no total and refuse nothing; until then they count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from clients.hurried import impatient
from helpers import distance, make_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from servers import SDK_WARNINGS, adapter, served, twin
from torch import Tensor

from pullback.backends import AdamParams, Backend, TorchBackend
from pullback.backends.remote import Capabilities, RemoteBackend
from pullback.backends.remote.connection.futures import RemoteFuture
from pullback.datums import Datum
from pullback.errors import (
    IncompleteUnitError,
    MixedDenominatorsError,
    PrecedingOperationFailed,
    RemoteError,
    UnsupportedError,
)
from pullback.losses import GRPO

pytestmark = SDK_WARNINGS
PARAMS = AdamParams(learning_rate=1e-2, eps=1e-2)  # so that a gradient of another size makes another step
UNITS = [make_data([6, 5, 7, 4, 3, 8])[i : i + 2] for i in (0, 2, 4)]  # a group each
MEAN, BY_GROUP = GRPO(aggregation="token_mean"), GRPO(aggregation="group_mean_token_mean")
REFUSALS = (IncompleteUnitError, MixedDenominatorsError, UnsupportedError)
WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "plain": {"capabilities": Capabilities()},
    "deferred": {"defer_backward": True},
}
Connect = Callable[..., RemoteBackend]


def confidence(_: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.stack([x.exp().sum() for x in logprobs]).sum(), {}


def broken(_: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    raise KeyError("mine")


VERBS: dict[str, Callable[[Backend, Sequence[Datum]], Any]] = {
    "sum": lambda backend, data: backend.forward_backward(data, "ppo"),
    "mean": lambda backend, data: backend.forward_backward(data, MEAN),
    "groups": lambda backend, data: backend.forward_backward(data, BY_GROUP),
    "function": lambda backend, data: backend.forward_backward_custom(data, confidence),
    "mean counted here": lambda backend, data: backend.forward_backward_custom(data, MEAN),
}
DENOMINATORS = {"sum": "none", "mean": "tokens", "groups": "groups", "function": "none", "mean counted here": "tokens"}


def refused_there(data: Sequence[Datum]) -> list[Datum]:
    """Data that only the service knows to be wrong: its vocabulary ends before these targets."""
    return [d.with_inputs(target_tokens=[99] * len(d.model_input)) for d in data]


@dataclass
class Sent:
    """A call of a schedule, and what the user holds of it."""

    verb: str
    unit: int
    fails: bool
    by_name: bool
    future: Any = None
    known: bool = False
    read: bool = False


@dataclass
class Model:
    """What must be in the totals, and what must be refused, in plain words."""

    way: str
    sent: list[Sent] = field(default_factory=list)

    @property
    def counting(self) -> list[Sent]:
        return [one for one in self.sent if not (one.fails and one.known)]

    def goes_by_name(self, verb: str) -> bool:
        """A sum; a mean where the service divides, unless it divides by what is counted here already."""
        counted_here = any(DENOMINATORS[one.verb] != "none" and not one.by_name for one in self.counting)
        named = verb == "sum" or (verb in ("mean", "groups") and self.way == "ours")
        return named and self.way != "deferred" and not (self.way == "ours" and counted_here)

    def refuses(self, verb: str, unit: int) -> bool:
        own, others = DENOMINATORS[verb], {DENOMINATORS[one.verb] for one in self.counting}
        if verb == "groups" and any(one.verb == "groups" and one.unit == unit for one in self.counting):
            return True
        if self.way == "plain":  # a mean is divided when it is sent, and stays alone
            return bool(others) and (own != "none" or others != {"none"})
        named = any(one.by_name for one in self.counting)
        return bool(others - {own}) or (own != "none" and named and not self.goes_by_name(verb))


def call(backend: RemoteBackend, model: Model, step: tuple[str, int, bool, bool]) -> None:
    """Make a call, which the model admits or refuses; read its failure now, or later."""
    verb, unit, fails, reads = step
    refused, by_name = model.refuses(verb, unit), model.goes_by_name(verb)
    fails &= by_name or verb == "function"  # the SDK sends nothing more after a custom call that failed at the service
    if fails and not by_name:
        future = backend.forward_backward_custom(UNITS[unit], broken)
    else:
        future = VERBS[verb](backend, refused_there(UNITS[unit]) if fails else UNITS[unit])
    if refused:
        assert isinstance(future.exception(), REFUSALS)
        return
    one = Sent(verb, unit, fails, by_name, future, known=not by_name)
    model.sent.append(one)
    if reads:
        read(one)


def read(one: Sent) -> None:
    error = one.future.exception()
    assert isinstance(error, RemoteError if one.by_name else KeyError) if one.fails else error is None
    one.known = one.read = True


def compared(connect: Connect, models: Any, way: str, schedule: Sequence[tuple[str, int, bool, bool]]) -> None:
    """Run a schedule beside the model; then a checkpoint and a step, which is the native one on what was accepted."""
    remote, model = connect(**WAYS[way]), Model(way)
    native = twin(models, remote.trainer)
    for step in schedule:
        call(remote, model, step)
    if any(one.fails and not one.read for one in model.sent):
        assert isinstance(remote.optim_step(PARAMS).exception(), PrecedingOperationFailed)
    for one in model.sent:
        read(one)
    saved = remote.save_state("between", overwrite=True).exception()
    assert isinstance(saved, UnsupportedError) if model.counting else saved is None
    for one in model.counting:
        VERBS[one.verb](native, UNITS[one.unit]).result()
    found, wanted = (backend.optim_step(PARAMS).result() for backend in (remote, native))
    assert [entry.loss for entry in found.ledger] == [entry.loss for entry in wanted.ledger]
    assert (found.stepped, remote.weights_version) == (wanted.stepped, native.weights_version)
    if way != "plain":
        assert found.divided_by == pytest.approx(wanted.divided_by)
    if wanted.stepped:
        assert found.metrics["grad_norm"] == pytest.approx(wanted.metrics["grad_norm"], rel=1e-4)
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-4
    remote.close()


CALLS = st.tuples(st.sampled_from(list(VERBS)), st.integers(0, 2), st.booleans(), st.booleans())
RETRIED = [
    ("groups", 0, True, True),
    ("groups", 0, False, True),
    ("groups", 1, True, False),
    ("groups", 2, False, False),
]
REPLACED = [("mean", 0, True, True), ("sum", 1, True, False), ("function", 0, False, True), ("sum", 2, False, False)]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@given(schedule=st.lists(CALLS, min_size=1, max_size=5))
@example(schedule=RETRIED)
@example(schedule=REPLACED)
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
def test_what_failed_is_in_no_total(connect: Connect, models: Any, way: str, schedule: list[Any]) -> None:
    """Calls that succeed, that fail and are read of at once, later or by a refused step: totals, refusals and divisors."""
    compared(connect, models, way, schedule)


@pytest.mark.parametrize("schedule", [RETRIED, REPLACED])
def test_failures_that_stay_in_the_totals_are_noticed(
    connect: Connect, models: Any, schedule: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    compared(connect, models, "ours", schedule)
    monkeypatch.setattr(RemoteFuture, "state", "accepted")
    with pytest.raises(AssertionError):
        compared(connect, models, "ours", schedule)


@pytest.mark.slow
def test_a_late_forward_is_no_gradient(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held back, a call has sent no more than a forward: whatever becomes of that, the step goes on without it."""
    backend, gate, original = connect(defer_backward=True), threading.Event(), TorchBackend.forward

    def slow(*args: Any, **options: Any) -> Any:
        gate.wait(120)
        return original(*args, **options)

    monkeypatch.setattr(TorchBackend, "forward", slow)
    with impatient(backend, 0.3):
        assert isinstance(backend.forward_backward(UNITS[0], "ppo").exception(), TimeoutError)
    gate.set()
    backend.forward(UNITS[0]).result(timeout=120)
    backend.forward_backward(UNITS[1], "ppo").result()
    assert backend.optim_step(PARAMS).result().stepped


@pytest.mark.slow
@pytest.mark.parametrize("error", [TimeoutError("a judge"), RemoteError("a judge", "unknown")])
def test_what_a_function_waited_for_in_vain_is_no_gradient(connect: Connect, error: Exception) -> None:
    """An error of the user's own service, of whatever type, says nothing of ours."""
    backend = connect()

    def judged(_: Any, logprobs: Any) -> Any:
        raise error

    backend.forward_backward(UNITS[1], "ppo").result()
    assert backend.forward_backward_custom(UNITS[0], judged).exception() is error
    assert backend.optim_step(PARAMS).result().stepped
