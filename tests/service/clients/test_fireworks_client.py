"""Fireworks' SDK, as it is, against our service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from clients.fireworks_sdk import MEANS, PARAMS, SUMS, confidence, given, sdk, trainer
from helpers import distance
from servers import SDK_WARNINGS, adapter, served, twin
from tiers import sampled
from torch import Tensor

from pullback.datums import to_fireworks

pytestmark = SDK_WARNINGS


@pytest.mark.parametrize(("loss", "mode"), sampled([*SUMS, *MEANS], [*SUMS, *MEANS][::2], several=True))
def test_their_client_trains_as_native_does(fireworks: Any, models: Any, loss: str, mode: str | None) -> None:
    """Built-in losses in two calls, a step in every normalisation: the adapters are the native ones."""
    client = trainer(fireworks)
    native = twin(models, client)
    for _ in range(2):
        for part in (slice(0, 2), slice(2, 4)):
            found = client.forward_backward(to_fireworks(given(loss)[part]), loss).result()
            wanted = native.forward_backward(given(loss)[part], loss).result()
            assert found.metrics["loss:sum"] == pytest.approx(wanted.metrics["loss:sum"], rel=1e-5)
        step = client.optim_step(sdk.AdamParams(learning_rate=1e-2), grad_accumulation_normalization=mode).result()
        done = native.optim_step(PARAMS, None if mode == "none" else mode).result()  # type: ignore[arg-type]
        assert step.metrics["divided_by"] == done.divided_by
        assert step.metrics["grad_norm"] == pytest.approx(done.metrics["grad_norm"], rel=1e-4)
    assert distance(adapter(served(models, client)), adapter(native)) < 1e-5


def test_their_custom_loss_costs_one_forward(fireworks: Any, models: Any) -> None:
    """forward, then forward_backward_custom: scores and gradient are the native ones, and no forward runs twice."""
    client = trainer(fireworks)
    native = twin(models, client)
    data = given("cross_entropy")
    scores, wanted = client.forward(to_fireworks(data), "cross_entropy").result(), native.forward(data).result()
    assert scores.metrics["loss:sum"] == pytest.approx(wanted.metrics["loss:sum"], rel=1e-5)
    for one, other in zip(scores.loss_fn_outputs, wanted.loss_fn_outputs, strict=True):
        assert one["logprobs"].data == pytest.approx(other["logprobs"].data, abs=1e-5)
    client.optim_step(sdk.AdamParams()).result()
    for _ in range(2):
        result = client.forward_backward_custom(to_fireworks(data), confidence).result()
        native.forward_backward_custom(data, confidence).result()
        assert result.metrics["mine"] == 1.0
        assert result.metrics["forward_tokens:sum"] == 0.0
        assert result.metrics["reused_tokens:sum"] == sum(len(d.model_input) for d in data)
    assert distance(served(models, client).gradients(), native.gradients()) < 1e-5


def test_their_uploads_may_overtake_each_other(fireworks: Any, models: Any, monkeypatch: Any) -> None:
    """A call of four requests and a step, none waited for: their client lets a turn go before the server has answered."""
    from fireworks.training.sdk._core.lib.public_interfaces import training_client

    monkeypatch.setattr(training_client, "MAX_CHUNK_LEN", 1)
    client = trainer(fireworks)
    native = twin(models, client)
    for _ in range(3):
        found = client.forward_backward(to_fireworks(given("ppo")), "ppo")
        step = client.optim_step(sdk.AdamParams(learning_rate=1e-2), "num_loss_tokens")
        wanted = native.forward_backward(given("ppo"), "ppo").result()
        done = native.optim_step(PARAMS, "num_loss_tokens").result()
        assert found.result().metrics["loss:sum"] == pytest.approx(wanted.metrics["loss:sum"], rel=1e-5)
        assert step.result().metrics["divided_by"] == done.divided_by
    assert distance(adapter(served(models, client)), adapter(native)) < 1e-5


def test_their_client_saves_loads_and_lists(fireworks: Any, models: Any) -> None:
    """Saved and loaded by its own name, or as it was returned; a name that two models have must be given whole."""
    client = trainer(fireworks)
    params = sdk.AdamParams(learning_rate=1e-2)
    data = to_fireworks(given("ppo"))

    def step(one: Any) -> dict[str, Tensor]:
        one.forward_backward(data, "ppo").result()
        one.optim_step(params).result()
        return adapter(served(models, one))

    step(client)
    path = client.save_state("step-1").result().path
    assert path.endswith("/step-1")
    assert "://" not in path
    assert "step-1" in client.list_checkpoints()
    after = step(client)
    for name in ("step-1", path):
        client.load_state_with_optimizer(name).result()
        assert distance(step(client), after) == 0.0
    client.load_state("step-1").result()
    assert distance(step(client), after) > 1e-4  # the optimizer began again
    other = trainer(fireworks, seed=4)
    other.load_state_with_optimizer("step-1").result()
    assert distance(step(other), after) == 0.0
    other.save_state("step-1").result()
    third = trainer(fireworks, seed=5)
    assert path in third.list_checkpoints()
    with pytest.raises(sdk.RequestFailedError, match=r"several checkpoints.*run-"):
        third.load_state("step-1").result()
    with pytest.raises(sdk.RequestFailedError, match="there is no checkpoint"):
        third.load_state("step-2").result()
    third.load_state_with_optimizer(path).result()
    assert distance(step(third), after) == 0.0
    assert client.save_weights_for_sampler("sampler").result().path


def test_their_frozen_reference(fireworks: Any, models: Any) -> None:
    """A base-only model scores as the base does, and nothing trains it."""
    client, base = trainer(fireworks), fireworks.create_base_training_client("tiny")
    data = given("cross_entropy")
    wanted = twin(models, client).reference().forward(data).result()
    client.forward_backward(to_fireworks(data), "cross_entropy").result()
    client.optim_step(sdk.AdamParams(learning_rate=0.1)).result()
    found = base.forward(to_fireworks(data), "cross_entropy").result()
    for one, other in zip(found.loss_fn_outputs, wanted.loss_fn_outputs, strict=True):
        assert one["logprobs"].data == pytest.approx(other["logprobs"].data, abs=1e-5)
    assert base.get_info().is_lora is False
    verbs: list[Callable[[], Any]] = [
        lambda: base.forward_backward(to_fireworks(data), "cross_entropy"),
        lambda: base.optim_step(sdk.AdamParams()),
        lambda: base.save_state("base"),
    ]
    for verb in verbs:
        with pytest.raises(sdk.RequestFailedError, match="only scores"):
            verb().result()


def test_what_they_cannot_have_is_refused_and_the_rest_goes_on(fireworks: Any) -> None:
    """Full tuning, other adapters and foreign weights fail in words; the next operation runs."""
    for options, words in (
        ({"rank": 0}, "full tuning"),
        ({"init_method": "nora"}, "init_method"),
        ({"projection_head_dim": 8}, "projection_head_dim"),
    ):
        with pytest.raises(sdk.RequestFailedError, match=words):
            trainer(fireworks, **options)
    client = trainer(fireworks, init_method="kaiming", alpha=None)
    with pytest.raises(sdk.RequestFailedError, match="its own checkpoints only"):
        client.load_adapter("accounts/me/models/one").result()
    assert client.forward(to_fireworks(given("cross_entropy")), "cross_entropy").result()
    assert client.unload_model().result().model_id == client.model_id
    assert fireworks.get_server_capabilities().supported_models[0].model_name == "tiny"
