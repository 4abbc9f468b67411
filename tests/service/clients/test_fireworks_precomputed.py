"""Fireworks' custom call on a forward that was made before: one forward for the scores, the loss and its gradient."""

from __future__ import annotations

from typing import Any

import pytest
from clients.fireworks_sdk import DATA, PARAMS, confidence, given, sdk, trainer
from helpers import distance
from servers import SDK_WARNINGS, Counting, adapter, served, twin

from pullback.datums import to_fireworks

pytestmark = SDK_WARNINGS
TOKENS = sum(len(datum.model_input) for datum in DATA)


@pytest.mark.parametrize("chunk", [1024, pytest.param(1, marks=pytest.mark.slow)])
def test_no_forward_runs_twice(fireworks: Any, models: Any, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """The gradient is the native one, and the graphs of the given forward are all used, in however many requests."""
    from fireworks.training.sdk._core.lib.public_interfaces import training_client

    monkeypatch.setattr(training_client, "MAX_CHUNK_LEN", chunk)
    client = trainer(fireworks)
    native, data = twin(models, client), to_fireworks(given("cross_entropy"))
    with Counting() as usual:
        client.forward_backward_custom(data, confidence).result()
    client.optim_step(sdk.AdamParams(learning_rate=0.0)).result()
    with Counting() as counted:
        scores = client.forward(data, "cross_entropy").result()
        result = client.forward_backward_custom(data, confidence, precomputed_forward=scores).result()
    assert result.metrics["forward_tokens:sum"] == 0.0
    assert result.metrics["reused_tokens:sum"] == TOKENS
    assert result.metrics["mine"] == 1.0
    native.forward_backward_custom(given("cross_entropy"), confidence).result()
    assert distance(served(models, client).gradients(), native.gradients()) < 1e-5
    assert counted.total == pytest.approx(usual.total, rel=0.01)


def test_the_scores_of_another_policy_are_not_taken_for_its_own(fireworks: Any, models: Any) -> None:
    """After a step the graphs are gone: the same cotangent runs through a forward of the present weights."""
    client = trainer(fireworks)
    native, data = twin(models, client), to_fireworks(given("cross_entropy"))
    scores = client.forward(data, "cross_entropy").result()
    leaves: list[Any] = []

    def kept(data: Any, logprobs: Any) -> Any:
        leaves.extend(logprobs)
        return confidence(data, logprobs)

    for backend, one in ((client, data), (native, given("cross_entropy"))):
        backend.forward_backward(one, "cross_entropy").result()
    client.optim_step(sdk.AdamParams(learning_rate=1e-2)).result()
    native.optim_step(PARAMS).result()
    assert distance(adapter(served(models, client)), adapter(native)) < 1e-5
    result = client.forward_backward_custom(data, kept, precomputed_forward=scores).result()
    assert "reused_tokens:sum" not in result.metrics
    weighted = [d.with_inputs(weights=-x.grad) for d, x in zip(given("cross_entropy"), leaves, strict=True)]
    native.forward_backward(weighted, "cross_entropy").result()
    assert distance(served(models, client).gradients(), native.gradients()) < 1e-5


def test_scores_that_do_not_fit_are_refused_by_the_client(fireworks: Any, models: Any) -> None:
    """Nothing is sent, so that the model's numbers have no gap: the next operation runs."""
    client = trainer(fireworks)
    data = to_fireworks(given("cross_entropy"))
    scores = client.forward(data[:2], "cross_entropy").result()
    with pytest.raises(ValueError, match="one output per datum"):
        client.forward_backward_custom(data, confidence, precomputed_forward=scores)
    client.forward_backward_custom(data[:2], confidence, precomputed_forward=scores).result()
    assert client.optim_step(sdk.AdamParams()).result().metrics["grad_norm"] > 0
