"""What the official SDK can ask of the service: every loss, every way to a state, listings, ends, and data that is cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import tinker
import torch
from helpers import distance, make_data
from servers import KEY, SDK_WARNINGS, adapter, finished, json_datum, new_model, served, tiny_models, twin
from torch import Tensor

from pullback.backends import AdamParams
from pullback.datums import Datum, ModelInput, to_tinker
from pullback.losses import loss_names, registry
from pullback.service import ServedModels, serving
from pullback.service.http import app

pytestmark = SDK_WARNINGS
DATA = make_data([6, 5, 7, 4])
PARAMS = tinker.AdamParams(learning_rate=1e-2)


def read_by(loss: str, data: list[Datum] = DATA) -> list[Datum]:
    """Datums with the inputs of a loss, and no others."""
    made = registry.build(loss)
    kept = {"target_tokens", *made.required_inputs, *made.optional_inputs}
    return [Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k in kept}) for d in data]


def trainer(service: tinker.ServiceClient, **options: Any) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", **{"rank": 4, "seed": 3, **options}).result()


@pytest.mark.parametrize("loss", loss_names())
def test_every_registered_loss_by_name(service: Any, models: ServedModels, loss: str) -> None:
    """The gradient and the value are the native ones, whatever is registered."""
    client = trainer(service)
    native = twin(models, client)
    result = client.forward_backward(to_tinker(read_by(loss)), loss).result()
    expected = native.forward_backward(DATA, loss).result()
    assert result.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    assert distance(served(models, client).gradients(), native.gradients()) < 1e-5


def _ratio(datum: Datum, logprobs: Tensor) -> Tensor:
    return (logprobs - datum.loss_fn_inputs["logprobs"].to_torch()).exp()


def _whole(datum: Datum, logprobs: Tensor) -> Tensor:
    """The geometric mean of the trained tokens' ratios, for each token."""
    mean = _ratio(datum, logprobs).log()[_input(datum, "weights") != 0].mean()
    return mean.exp().expand(logprobs.shape)


def _input(datum: Datum, key: str) -> Tensor:
    return datum.loss_fn_inputs[key].to_torch()


# The protocol's own formulas: sums over tokens, never averaged.
SUMS: dict[str, Callable[[Datum, Tensor], Tensor]] = {
    "cross_entropy": lambda d, lp: -lp,
    "importance_sampling": lambda d, lp: -_ratio(d, lp) * _input(d, "advantages"),
    "ppo": lambda d, lp: (
        -torch.minimum(_ratio(d, lp) * _input(d, "advantages"), _ratio(d, lp).clamp(0.8, 1.2) * _input(d, "advantages"))
    ),
    "cispo": lambda d, lp: -_ratio(d, lp).clamp(0.0, 5.0) * _input(d, "advantages") * lp,
    "dro": lambda d, lp: 0.025 * (lp - _input(d, "logprobs")).square() - _input(d, "advantages") * lp,
    "gspo": lambda d, lp: (
        -torch.minimum(
            _whole(d, lp) * _input(d, "advantages"), _whole(d, lp).clamp(1 - 3e-4, 1 + 4e-4) * _input(d, "advantages")
        )
    ),
}


@pytest.mark.parametrize("loss", SUMS)
def test_the_protocols_own_names_are_sums(service: Any, models: ServedModels, loss: str) -> None:
    """From the log-probs that come back; and two calls give twice the gradient of one."""
    client = trainer(service)
    wire = to_tinker(read_by(loss))
    result = client.forward_backward(wire, loss).result()
    once = served(models, client).gradients()
    expected = 0.0
    for datum, output in zip(DATA, result.loss_fn_outputs, strict=True):
        trained = _input(datum, "weights") != 0
        logprobs = torch.as_tensor(output["logprobs"].to_torch())
        expected += float((SUMS[loss](datum, logprobs) * _input(datum, "weights"))[trained].double().sum())
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    client.forward_backward(wire, loss).result()
    twice = served(models, client).gradients()
    assert distance(twice, {name: 2 * gradient for name, gradient in once.items()}) < 1e-6


def _steps(client: Any, count: int) -> None:
    for _ in range(count):
        client.forward_backward(to_tinker(read_by("ppo")), "ppo")
        client.optim_step(PARAMS).result()


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_client_from_a_state(service: Any, models: ServedModels, optimizer: bool) -> None:
    """With the optimizer the next step is the first client's; without it, a cold one from the same weights."""
    client = trainer(service)
    _steps(client, 2)
    path = client.save_state(f"state-{optimizer}").result().path
    made = "create_training_client_from_state" + ("_with_optimizer" if optimizer else "")
    again = getattr(service, made)(path).result()
    native = twin(models, again)
    assert distance(adapter(served(models, again)), adapter(served(models, client))) == 0.0
    _steps(client, 1)
    _steps(again, 1)
    native.forward_backward(DATA, "ppo").result()
    native.optim_step(AdamParams(learning_rate=1e-2)).result()
    same = distance(adapter(served(models, again)), adapter(served(models, client)))
    assert same == 0.0 if optimizer else same > 1e-3
    cold = distance(adapter(served(models, again)), adapter(native))
    assert cold > 1e-3 if optimizer else cold < 1e-5


def test_a_state_into_a_client_that_trains(service: Any, models: ServedModels) -> None:
    """The SDK's older way: the weights come back, and gradients from before are forgotten."""
    client = trainer(service)
    _steps(client, 1)
    before = adapter(served(models, client))
    path = client.save_state("back").result().path
    _steps(client, 1)
    client.forward_backward(to_tinker(read_by("ppo")), "ppo").result()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client.load_state(path).result()
    assert distance(adapter(served(models, client)), before) == 0.0
    assert served(models, client).gradients() == {}


def test_listings_and_info(service: Any, url: str) -> None:
    """Runs, checkpoints, sessions, weights: by the SDK's REST client; a deleted checkpoint is gone."""
    client, lists = trainer(service), tinker.RestClient(base_url=url, api_key=KEY)
    _steps(client, 1)
    path = client.save_state("kept").result().path
    client.save_weights_for_sampler("drawn").result()
    info = client.get_info()
    assert (info.model_data.model_name, info.lora_rank, info.is_lora) == ("tiny", 4, True)
    run = lists.get_training_run(client.model_id).result()
    assert (run.base_model, run.last_checkpoint.tinker_path) == ("tiny", path)
    assert client.model_id in [r.training_run_id for r in lists.list_training_runs(limit=1000).result().training_runs]
    found = {c.checkpoint_id: c for c in lists.list_checkpoints(client.model_id).result().checkpoints}
    assert {c.checkpoint_type for c in found.values()} == {"training", "sampler"}
    assert found["weights/kept"].size_bytes > 1000
    weights = lists.get_weights_info_by_tinker_path(path).result()
    assert (weights.base_model, weights.lora_rank) == ("tiny", 4)
    session = client.model_id.split(":")[0]
    assert session in lists.list_sessions(limit=1000).result().sessions
    assert lists.get_session(session).result().training_run_ids == [client.model_id]
    served_models = lists.get_server_capabilities().result().supported_models
    assert [(m.model_name, m.max_context_length) for m in served_models] == [("tiny", 128)]
    lists.delete_checkpoint(client.model_id, "weights/kept").result()
    assert [c.checkpoint_id for c in lists.list_checkpoints(client.model_id).result().checkpoints] == [
        "sampler_weights/drawn"
    ]
    with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
        service.create_training_client_from_state(path).result()


def test_the_end_of_a_session_frees_its_models(url: str, models: ServedModels, monkeypatch: Any) -> None:
    """Closing the client lets the models go; its checkpoints stay."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with tinker.ServiceClient(base_url=url, api_key=KEY) as client:
        model = trainer(client)
        path = model.save_state("last").result().path
        assert model.model_id in models.backends
    with tinker.ServiceClient(base_url=url, api_key=KEY) as client:
        assert client.create_training_client_from_state(path).result() is not None
    assert model.model_id not in models.backends


def _nll(_: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.cat(logprobs).sum(), {}


@pytest.fixture
def cut(tmp_path: Any, monkeypatch: Any) -> Iterator[Any]:
    """A service whose clients cut their data into threes."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setitem(app._CLIENT, "fwdbwd_max_chunk_len", 3)
    models = tiny_models(tmp_path)
    with serving(models, keys=[KEY]) as url, tinker.ServiceClient(base_url=url, api_key=KEY) as client:
        yield models, client


def test_graphs_are_kept_across_a_clients_chunks(cut: Any) -> None:
    """A custom call in two chunks: every token is reused, and the gradient is that of one call."""
    models, service = cut
    client = trainer(service)
    native = twin(models, client)
    metrics = client.forward_backward_custom(to_tinker(read_by("cross_entropy")), _nll).result().metrics
    assert metrics["reused_tokens:sum"] == sum(len(d.model_input) for d in DATA)
    assert metrics["forward_tokens:sum"] == 0
    native.forward_backward_custom(DATA, _nll).result()
    assert distance(served(models, client).gradients(), native.gradients()) < 1e-5


def test_a_pair_that_was_cut_is_refused(cut: Any) -> None:
    """Half a pair says so; nothing of the call that can be refused is trained on in silence."""
    _, service = cut
    client = trainer(service)
    sent = client.forward_backward(to_tinker(read_by("dpo")), "dpo")
    with pytest.raises(tinker.RequestFailedError, match="has no partner; pairs are neighbours"):
        sent.result()
    client = trainer(service)
    client.forward_backward(to_tinker(read_by("dpo")), "dpo")
    with pytest.raises(tinker.RequestFailedError, match="this step was sent before that was known"):
        client.optim_step(PARAMS).result()


def test_ordinary_clients_do_not_cut(service: Any, models: ServedModels) -> None:
    """More datums than the SDK sends by itself go in one request, so that no pair and no group is cut."""
    client = trainer(service)
    native = twin(models, client)
    many = [
        Datum(ModelInput.from_ints([i % 7]), {"target_tokens": [i % 5], "weights": [1.0], "ref_logprobs": [-1.0]})
        for i in range(1030)
    ]
    calls = []
    original = type(native).forward_backward

    def counted(backend: Any, *given: Any, **options: Any) -> Any:
        calls.append(len(given[0]))
        return original(backend, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(native), "forward_backward", counted)
        client.forward_backward(to_tinker(many), "dpo").result()
    assert calls == [1030]


def test_a_graph_of_other_weights_is_not_used(web: Any, url: str, models: ServedModels) -> None:
    """A step between the two halves of a custom loss: the forward runs again, the counters say so, the gradient is right."""
    http = web(url)
    _, made = new_model(http)
    model = made["model_id"]
    custom, plain = ({"x-sdk-method": f"TrainingClient.forward_backward{end}"} for end in ("_custom", ""))
    inner = {"data": [json_datum([3, 1, 4, 1])], "loss_fn": "cross_entropy", "loss_fn_config": {}}

    def send(route: str, number: int, body: dict[str, Any], headers: dict[str, str]) -> Any:
        sent = http.post(route, json={"model_id": model, "seq_id": number, **body}, headers=headers).json()
        return finished(http, sent["request_id"])

    before = _amount(url, "graph_tokens_recomputed")
    send("forward_backward", 1, {"forward_backward_input": inner}, plain)
    send("forward", 2, {"forward_input": inner}, custom)
    send("optim_step", 3, {"adam_params": {"learning_rate": 0.1}}, plain)
    native = twin(models, type("Client", (), {"model_id": model}))
    send("forward_backward", 4, {"forward_backward_input": inner}, custom)
    assert _amount(url, "graph_tokens_recomputed") == before + 4
    given = [Datum(ModelInput.from_ints([3, 1, 4, 1]), {"target_tokens": [3, 1, 4, 1], "weights": [1.0] * 4})]
    native.forward_backward(given, "cross_entropy").result()
    assert distance(models.backends[model].gradients(), native.gradients()) < 1e-5


def _amount(url: str, what: str) -> float:
    text = httpx.get(f"{url}/metrics", headers={"x-api-key": KEY}).text
    found = [line for line in text.splitlines() if line.startswith(f'pullback_amount_total{{what="{what}"}}')]
    return float(found[0].split()[-1]) if found else 0.0


def test_normalisation_among_the_parameters_of_a_named_optimizer(service: Any, models: ServedModels) -> None:
    """The one place where the official SDK passes on what it does not know: our client divides by it; typos are refused."""
    from tinker.types.optimizer import OptimParamsBase

    client = trainer(service)
    native = twin(models, client)
    client.forward_backward(to_tinker(read_by("ppo")), "ppo").result()
    native.forward_backward(DATA, "ppo").result()
    with pytest.raises(tinker.RequestFailedError, match=r"do not know|does not know: \['lerning_rate'\]"):
        client.optim_step(OptimParamsBase(type="adamw", lerning_rate=1.0)).result()
    with pytest.raises(tinker.RequestFailedError, match="optimizer is adamw"):
        client.optim_step(tinker.DimuonParams(learning_rate=1.0)).result()
    mode = {"grad_accumulation_normalization": "num_loss_tokens"}
    client.optim_step(OptimParamsBase(type="adamw", learning_rate=1e-2, **mode)).result()
    native.optim_step(AdamParams(learning_rate=1e-2), "num_loss_tokens").result()
    assert distance(adapter(served(models, client)), adapter(native)) < 1e-5


def test_answers_leave_at_once(service: Any, url: str) -> None:
    """Nagle's algorithm is off on the server's connections: with it each answer takes 40 ms."""
    import gc
    import socket

    trainer(service)
    port = int(url.rsplit(":", 1)[1])
    found = []
    for one in gc.get_objects():
        if type(one) is socket.socket and one.fileno() >= 0 and one.family == socket.AF_INET:
            try:
                if one.getsockname()[1] == port and one.getpeername():
                    found.append(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            except OSError:  # it listens
                continue
    assert found
    assert all(found)
