"""Fireworks' SDK, as it is, against our service; and `RemoteBackend` on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import distance, make_data
from servers import KEY, SDK_WARNINGS, adapter, rest, served, twin
from torch import Tensor

import pullback
from pullback.backends import AdamParams, RemoteBackend, SamplingParams
from pullback.datums import Datum, ModelInput, from_tinker, to_fireworks
from pullback.errors import (
    ConfigError,
    DoubleNormalizationError,
    MissingExtraError,
    RemoteError,
    UnretrievedFailureError,
    UnsupportedError,
)
from pullback.losses import GRPO

sdk = pytest.importorskip("fireworks.training.sdk", reason="Fireworks' SDK is not installed: pip install fireworks-ai")
pytestmark = SDK_WARNINGS
DATA = make_data([6, 5, 7, 4])
PARAMS = AdamParams(learning_rate=1e-2)
READ = {
    "cross_entropy": ("target_tokens", "weights"),
    "ppo": ("target_tokens", "weights", "logprobs", "advantages"),
    "grpo": ("target_tokens", "weights", "logprobs", "advantages", "group_id"),
    "dpo": ("target_tokens", "weights", "ref_logprobs"),
}
SUMS = [
    (loss, mode) for loss in ("cross_entropy", "ppo") for mode in (None, "none", "num_loss_tokens", "num_sequences")
]
MEANS = [(loss, mode) for loss in ("grpo", "dpo") for mode in (None, "none")]


def given(loss: str) -> list[Datum]:
    """What a loss reads, and no more."""
    return [Datum(d.model_input, {k: d.loss_fn_inputs[k] for k in READ[loss]}) for d in DATA]


def confidence(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.stack([x.exp().mean() for x in logprobs]).sum(), {"mine": 1.0}


def finish(client: Any, url: str) -> None:
    """Let go of a client's models: this SDK has no end of a session."""
    with rest(url) as http:
        http.post(f"sessions/{client.holder.get_session_id()}/finish", json={})
    client.close()


@pytest.fixture
def fireworks(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = sdk.ServiceClient(base_url=url, api_key=KEY)
    yield client
    finish(client, url)


def trainer(fireworks: Any, **options: Any) -> Any:
    return fireworks.create_lora_training_client("tiny", **{"rank": 4, "seed": 3, **options})


@pytest.mark.parametrize(("loss", "mode"), [*SUMS, *MEANS])
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


@pytest.fixture
def connect(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RemoteBackend]]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    made: list[RemoteBackend] = []

    def make(**options: Any) -> RemoteBackend:
        lora = {"seed": 3, "alpha": None}
        made.append(
            pullback.connect(url, base_model="tiny", rank=4, api_key=KEY, sdk="fireworks", lora=lora, **options)
        )
        return made[-1]

    yield make
    for backend in made:
        finish(backend._service, url)


def _script(backend: Any) -> None:
    backend.forward_backward(given("ppo"), "ppo").result()
    backend.forward_backward_custom(given("cross_entropy"), confidence).result()


WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "theirs": {"capabilities": pullback.backends.remote.sdks.FireworksSdk.plain},
    "deferred": {"defer_backward": True},
}


@pytest.mark.parametrize("mode", ["num_loss_tokens", "num_sequences", "auto", None])
@pytest.mark.parametrize("way", WAYS)
def test_one_script_by_their_sdk(connect: Any, models: Any, way: str, mode: Any) -> None:
    """By name, by cotangents, and held; divided by the service in every mode: the adapters are the native ones."""
    remote = connect(**WAYS[way])
    native = twin(models, remote.trainer)
    for backend in (native, remote):
        if mode == "auto":
            backend.forward_backward(given("grpo"), GRPO()).result()
        else:
            _script(backend)
        assert backend.optim_step(PARAMS, mode).result().stepped
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-5
    remote.close()


def test_normalisation_is_always_said(connect: Any, monkeypatch: Any) -> None:
    """Each step names its mode in the SDK's own field; a second normalisation is refused before anything is sent."""
    remote = connect()
    said: list[Any] = []
    original = type(remote.trainer).optim_step

    def spy(self: Any, params: Any, **options: Any) -> Any:
        said.append(options)
        return original(self, params, **options)

    monkeypatch.setattr(type(remote.trainer), "optim_step", spy)
    for mode in (None, "num_loss_tokens", "num_sequences"):
        remote.forward_backward(given("ppo"), "ppo").result()
        remote.optim_step(PARAMS, mode).result()
    remote.forward_backward(given("grpo"), "grpo").result()
    with pytest.raises(DoubleNormalizationError):
        remote.optim_step(PARAMS, "num_loss_tokens").result()
    assert [one["grad_accumulation_normalization"] for one in said] == ["none", "num_loss_tokens", "num_sequences"]


def test_state_and_reference_by_their_sdk(connect: Any, models: Any) -> None:
    """Checkpoints in the SDK's form, the frozen base on any targets, and what it has not in words."""
    first, second = connect(), connect()
    wanted = twin(models, first.trainer).reference().forward(DATA).result()
    first.forward_backward(given("ppo"), "ppo").result()
    first.optim_step(PARAMS).result()
    found = first.reference().forward(DATA).result()
    for one, other in zip(found.loss_fn_outputs, wanted.loss_fn_outputs, strict=True):
        torch.testing.assert_close(one["logprobs"].to_torch(), other["logprobs"].to_torch(), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="log-probs only"):
        first.reference().forward(DATA, "ppo")
    assert first.reference().forward(DATA).result()
    before = len(models.backends)
    path = first.save_state("here-1").result().path
    second.load_state_with_optimizer(path).result()
    for backend in (first, second):
        backend.forward_backward(given("ppo"), "ppo").result()
        backend.optim_step(PARAMS).result()
    assert distance(*(adapter(served(models, b.trainer)) for b in (first, second))) == 0.0
    with pytest.raises(ConfigError, match="lower-case"):
        first.save_state("Step_1").result()
    with pytest.raises(UnsupportedError, match="overwrite"):
        first.save_state("here-1", overwrite=True).result()
    with pytest.raises(RemoteError, match="there is no checkpoint"):
        first.load_state("nowhere").result()
    with pytest.raises(UnsupportedError, match="deployment"):
        first.sample([ModelInput.from_ints([1])], 1, SamplingParams()).result()
    bad = [d.with_inputs(target_tokens=[99] * len(d.model_input)) for d in given("ppo")]
    first.forward_backward(bad, "ppo")
    with pytest.raises(UnretrievedFailureError, match="vocabulary"):
        first.close()
    assert len(models.backends) == before - 2  # its own, and its reference


def test_the_client_decides_the_sdk(fireworks: Any, url: str, monkeypatch: Any) -> None:
    """A client of theirs is taken as it is; a name that is none is refused; a missing extra says what to install."""
    backend = pullback.connect(fireworks, base_model="tiny", rank=2)
    assert backend.capabilities.normalizes
    assert backend.plan("cross_entropy", DATA).route == "native"
    assert backend.plan("ppo", given("ppo")).route == "two_passes"
    with pytest.raises(ConfigError, match=r"\['fireworks', 'tinker'\]"):
        pullback.connect(url, base_model="tiny", sdk="fire")
    again = from_tinker(to_fireworks(DATA))
    for one, other in zip(again, DATA, strict=True):
        assert one.model_input.to_ints() == other.model_input.to_ints()
        for key, value in other.loss_fn_inputs.items():
            assert torch.equal(one.loss_fn_inputs[key].to_torch(), value.to_torch())
    monkeypatch.setitem(sys.modules, "fireworks.training.sdk", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pullback\[fireworks\]'"):
        pullback.connect(url, base_model="tiny", sdk="fireworks")
