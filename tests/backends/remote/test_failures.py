"""What a service's failures become for the user of RemoteBackend: whose mistake, which phase, and what is still known."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
import tinker
from clients.hurried import impatient
from helpers import make_data
from servers import KEY, SDK_WARNINGS

import pullback
from pullback.backends import AdamParams, TorchBackend
from pullback.backends.remote import Capabilities, RemoteBackend
from pullback.backends.remote.connection.futures import Sent
from pullback.errors import (
    BackendError,
    ConfigError,
    DatumError,
    InvalidDatumsError,
    RemoteError,
    UnknownLossError,
    UnsupportedError,
)
from pullback.losses import DPO, GRPO, KL, PPO, ClipRange, Correction, CrossEntropy, get_loss, loss_names
from pullback.losses.registry import config_of

pytestmark = SDK_WARNINGS
DATA = make_data([6, 5, 7, 4])
PARAMS = AdamParams(learning_rate=1e-2)


def test_phases() -> None:
    """Queued behind what was sent before, running, reading, done; a timeout says which, and the future lives on."""
    first_sent: Future[int] = Future()
    sent: Future[int] = Future()
    first = Sent([first_sent], sum).future("forward")
    second = Sent([sent], sum, before=[[first_sent]]).future("optim_step")
    assert (first.phase, second.phase) == ("running", "queued")
    with pytest.raises(TimeoutError, match=r"optim_step was sent .* is queued behind 1 operation\(s\) at the service"):
        second.result(timeout=0.01)
    first_sent.set_result(1)
    assert (first.phase, second.phase) == ("reading", "running")
    with pytest.raises(TimeoutError, match="is running at the service"):
        second.result(timeout=0.01)
    sent.set_result(2)
    assert second.phase == "reading"
    assert (second.result(), first.result()) == (2, 1)
    assert (first.phase, second.phase) == ("done", "done")


def test_an_answer_that_cannot_be_read() -> None:
    """A malformed answer is the service's, and its effect is not known."""
    sent: Future[Any] = Future()
    sent.set_result({"no": "logprobs"})
    future = Sent([sent], lambda answers: answers[0]["logprobs"]).future("forward")
    with pytest.raises(RemoteError, match=r"forward: the service's answer could not be read: KeyError") as caught:
        future.result()
    assert caught.value.category == "unknown"


def test_the_backends_deadline_is_everybodys(connect: Callable[..., RemoteBackend], monkeypatch: Any) -> None:
    """`timeout=` bounds results and waits inside calls; the operation is not lost."""
    backend, gate = connect(), threading.Event()
    original = TorchBackend.forward_backward

    def slow(*given: Any, **options: Any) -> Any:
        gate.wait(120)
        return original(*given, **options)

    monkeypatch.setattr(TorchBackend, "forward_backward", slow)
    with impatient(backend, 0.3):
        first, second = (backend.forward_backward(DATA, "ppo") for _ in range(2))
    with pytest.raises(TimeoutError, match="queued behind 1"):
        second.result()
    with pytest.raises(TimeoutError, match="running"):
        first.result()
    gate.set()
    assert first.result(timeout=120).metrics["loss:sum"] == second.result(timeout=20).metrics["loss:sum"]


def test_a_gradient_of_unknown_fate_stops_everything(connect: Callable[..., RemoteBackend]) -> None:
    """No step is made on an accumulation of which nobody knows what it holds; a checkpoint is the way out."""
    backend = connect()
    path = backend.save_state("before").result().path
    trainer = backend.trainer

    class Broken:
        def forward_backward(self, *_: Any) -> Any:
            sent: Future[Any] = Future()
            sent.set_exception(tinker.APIConnectionError(request=httpx.Request("POST", "http://127.0.0.1")))
            return sent

    backend._remote.trainer = Broken()
    future = backend.forward_backward(DATA, "ppo")
    with pytest.raises(RemoteError, match="may have taken effect or not"):
        future.result()
    backend._remote.trainer = trainer
    with pytest.raises(BackendError, match="the service may hold it or not"):
        backend.optim_step(PARAMS).result()
    with pytest.raises(BackendError, match="load the last checkpoint"):
        backend.forward_backward(DATA, "ppo").result()
    backend.load_state(path).result()
    backend.forward_backward(DATA, "ppo").result()
    assert backend.optim_step(PARAMS).result().stepped


def test_clients_mistakes_are_not_sent_again(connect: Callable[..., RemoteBackend], url: str, monkeypatch: Any) -> None:
    """One request for a datum that the service refuses, one for a key that it does not know."""
    backend, calls = connect(), []
    original = TorchBackend.forward_backward

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(given)
        return original(*given, **options)

    monkeypatch.setattr(TorchBackend, "forward_backward", counted)
    with pytest.raises(RemoteError, match="vocabulary") as caught:
        backend.forward_backward([d.with_inputs(target_tokens=[99] * len(d.model_input)) for d in DATA], "ppo").result()
    assert caught.value.category == "user"
    assert len(calls) == 1
    before = _requests(url)
    with pytest.raises(RemoteError, match="does not know this API key"):
        pullback.connect(url, base_model="tiny", api_key="tml-wrong")
    assert 1 <= _requests(url) - before <= 3  # what it can do, the SDK's settings, and nothing again
    with pytest.raises(RemoteError, match="serves 'tiny', not 'other'"):
        pullback.connect(url, base_model="other", api_key=KEY)


def _requests(url: str) -> float:
    text = httpx.get(f"{url}/metrics", headers={"x-api-key": KEY}).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if 'status="401"' in line and "_total" in line)


def test_where_there_is_no_service() -> None:
    """Said at once; the SDK itself would go on calling for minutes."""
    with pytest.raises(RemoteError, match=r"no service answers at http://127\.0\.0\.1:9"):
        pullback.connect("http://127.0.0.1:9", base_model="tiny")


def test_this_machine_needs_no_key(tmp_path: Any, monkeypatch: Any) -> None:
    """A service without keys is reached without one, though the SDK wants to see one."""
    from servers import tiny_models

    from pullback.service import serving

    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with serving(tiny_models(tmp_path)) as open_url, pullback.connect(open_url, base_model="tiny", rank=2) as backend:
        assert backend.forward_backward(DATA, "ppo").result().metrics["tokens:sum"] > 0
        assert backend.optim_step(PARAMS).result().stepped


def confidence(_: Any, logprobs: Any) -> Any:
    return logprobs[0].sum(), {}


def test_plan_counts_and_refuses(connect: Callable[..., RemoteBackend]) -> None:
    """Where a loss would run, what runs twice, and what would lose a term."""
    ours, plain, deferred = connect(), connect(capabilities=Capabilities()), connect(defer_backward=True)
    tokens = sum(len(d.model_input) for d in DATA)
    assert [b.plan(confidence, DATA).route for b in (ours, plain, deferred)] == [
        "single_pass",
        "two_passes",
        "two_passes",
    ]
    assert [b.plan(confidence, DATA).recomputed for b in (ours, plain, deferred)] == [0, tokens, tokens]
    assert ours.plan(GRPO(kl=KL("k3", 0.1)), DATA).route == "native"
    assert plain.plan(GRPO(kl=KL("k3", 0.1)), DATA).route == "two_passes"
    without = [_without(d, "ref_logprobs") for d in DATA]
    for backend in (ours, plain, deferred):
        refused = backend.plan(GRPO(kl=KL("k3", 0.1)), without)
        assert refused.route == "refuse"
        assert "with_reference" in refused.reason
        with pytest.raises(UnknownLossError, match="did you mean"):
            backend.plan("gpro", DATA)
        with pytest.raises(InvalidDatumsError, match="datum 0"):
            backend.plan("ppo", [DATA[0].with_inputs(weights=[1.0])])
        with pytest.raises(ConfigError, match="did you mean 'kl_beta'"):
            backend.forward_backward(DATA, "grpo", {"kl_betta": 0.1}).result()
        with pytest.raises(DatumError, match="ref_logprobs"):
            backend.forward_backward(without, "grpo", {"kl_beta": 0.1}).result()
    plain.forward_backward(DATA, "ppo").result()
    for mean in (CrossEntropy("token_mean"), DPO()):
        refused = plain.plan(mean, _read_by(mean))
        assert refused.route == "refuse"
        assert "defer_backward" in refused.reason
        with pytest.raises(UnsupportedError, match="defer_backward"):
            plain.forward_backward(_read_by(mean), mean).result()
    assert plain.plan(confidence, DATA).route == "two_passes"


def _without(datum: Any, key: str) -> Any:
    return type(datum)(datum.model_input, {k: v for k, v in datum.loss_fn_inputs.items() if k != key})


def _read_by(loss: Any) -> Any:
    kept = {"target_tokens", *loss.required_inputs, *loss.optional_inputs}
    return [type(d)(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k in kept}) for d in DATA]


@pytest.mark.parametrize("name", loss_names())
def test_a_loss_and_its_config_are_the_same(name: str) -> None:
    """What `config_of` says builds the loss again; hyperparameters without a key have no config."""
    assert config_of(get_loss(name)) == {}


def test_configs_of_losses() -> None:
    """Flat keys of nested hyperparameters, or none at all."""
    kl = GRPO(ClipRange(0.7, 1.3), KL("k2", 0.2, "pathwise"), aggregation="sum")
    config = config_of(kl)
    assert config is not None
    assert get_loss("grpo", config) == kl
    assert config_of(DPO(0.3)) == {"beta": 0.3}
    assert config_of(GRPO(clip=None)) is None
    assert config_of(GRPO(kl=KL("k3", 0.1, importance=False))) is None
    plain, ours = Capabilities(), Capabilities(divides=True, weighs=True)
    for loss in (PPO(dual_clip=3.0), PPO(correction=Correction.tis())):
        assert ours.knows(loss)
        assert not plain.knows(loss)  # a key that the protocol does not have
    assert plain.knows(PPO(0.3))
