"""A service whose cross-entropy is a mean with a denominator of at least 1 is noticed, and used for what it does rightly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import distance, make_data
from servers import KEY, SDK_WARNINGS, adapter, served, twin
from torch import Tensor

import pullback
from pullback.backends import AdamParams, RemoteBackend
from pullback.backends.remote import Capabilities
from pullback.datums import Datum, TensorData
from pullback.errors import UnsupportedError
from pullback.losses import CrossEntropy

pytestmark = SDK_WARNINGS
DATA = [
    Datum(d.model_input, {k: d.loss_fn_inputs[k] for k in ("target_tokens", "weights")}) for d in make_data([6, 5, 7])
]
PARAMS = AdamParams(learning_rate=1e-2)
KNOWN = Capabilities(losses=frozenset(), max_weight_sum=1.0)


@pytest.fixture
def connect(url: str, models: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RemoteBackend]]:
    """Connects to a model of the service that has been given such a cross-entropy."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    made: list[RemoteBackend] = []

    def make(**options: Any) -> RemoteBackend:
        made.append(pullback.connect(url, base_model="tiny", rank=4, api_key=KEY, lora={"seed": 3}, **options))
        clamp(served(models, made[-1].trainer))
        return made[-1]

    yield make
    for backend in made:
        backend._service.__exit__(None, None, None)


def clamp(backend: Any) -> None:
    for verb, place in (("forward_backward", 0), ("backward", 1)):
        original = getattr(backend, verb)

        def divided(*given: Any, original: Any = original, place: int = place) -> Any:
            data = given[place]
            total = max(1.0, sum(float(d.loss_fn_inputs["weights"].to_torch().sum()) for d in data))
            scaled = [d.with_inputs(weights=TensorData(d.loss_fn_inputs["weights"].to_torch() / total)) for d in data]
            return original(*given[:place], scaled, *given[place + 1 :])

        setattr(backend, verb, divided)


def likelihood(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.cat(logprobs).sum(), {}


def test_a_mean_in_place_of_a_sum_is_noticed(connect: Any) -> None:
    """By name and by a function, once for each backend; a function whose weights stay below 1 is no reason."""
    with pytest.warns(RuntimeWarning, match="may divide by the weights"):
        connect().forward_backward(DATA, "cross_entropy").result()
    backend = connect()
    backend.forward_backward(DATA, CrossEntropy("token_mean")).result()
    backend.optim_step(PARAMS).result()
    with pytest.warns(RuntimeWarning, match="may divide by the weights"):
        backend.forward_backward_custom(DATA, likelihood).result()
    backend.forward_backward_custom(DATA, likelihood).result()


@pytest.mark.parametrize("deferred", [False, True])
def test_what_it_does_rightly_is_done_and_the_rest_refused(connect: Any, models: Any, deferred: bool) -> None:
    """A mean trains as natively; a sum is refused before its gradient is sent, and says what to do."""
    backend = connect(capabilities=KNOWN, defer_backward=deferred)
    native = twin(models, backend.trainer)
    for one in (native, backend):
        one.forward_backward(DATA, CrossEntropy("token_mean")).result()
        assert one.optim_step(PARAMS).result().stepped
    assert distance(adapter(served(models, backend.trainer)), adapter(native)) < 1e-5
    before = adapter(served(models, backend.trainer))

    def a_sum() -> None:
        backend.forward_backward_custom(DATA, likelihood).result()
        backend.optim_step(PARAMS).result()

    with pytest.raises(UnsupportedError, match=r"add up to 18, and the service divides"):
        a_sum()
    assert distance(adapter(served(models, backend.trainer)), before) == 0.0
