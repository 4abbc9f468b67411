"""What the official SDK can ask of the service: every way to a state, listings, ends, and a normalisation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tinker
from clients.tinker_sdk import DATA, read_by, trainer
from helpers import distance
from servers import KEY, SDK_WARNINGS, adapter, served, twin

from pullback.backends import AdamParams
from pullback.datums import to_tinker
from pullback.service import ServedModels

pytestmark = SDK_WARNINGS
PARAMS = tinker.AdamParams(learning_rate=1e-2)


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
