"""`RemoteBackend` on Fireworks' SDK."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from clients.fireworks_sdk import DATA, PARAMS, confidence, finish, given
from helpers import distance
from servers import KEY, SDK_WARNINGS, adapter, served, twin
from tiers import sampled

import pullback
from pullback.backends import RemoteBackend, SamplingParams
from pullback.backends.remote.sdk.sdks import FireworksSdk
from pullback.datums import ModelInput, from_tinker, to_fireworks
from pullback.errors import (
    ConfigError,
    DoubleNormalizationError,
    MissingExtraError,
    RemoteError,
    UnretrievedFailureError,
    UnsupportedError,
)
from pullback.losses import GRPO

pytestmark = SDK_WARNINGS


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
    "theirs": {"capabilities": FireworksSdk.plain},
    "deferred": {"defer_backward": True},
}


@pytest.mark.parametrize("mode", sampled(["num_loss_tokens", "num_sequences", "auto", None], ["num_loss_tokens", None]))
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
        first.reference().forward(DATA, "ppo").result()
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
