"""Data that a client cuts into requests, and graphs that are kept from one request to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tinker
import torch
from clients.tinker_sdk import DATA, read_by, trainer
from helpers import distance
from servers import KEY, SDK_WARNINGS, finished, json_datum, new_model, served, tiny_models, twin
from torch import Tensor

from pullback.datums import Datum, ModelInput, to_tinker
from pullback.service import ServedModels, serving
from pullback.service.http import client_config
from pullback.service.queueing.sequencer import Sequencer

pytestmark = SDK_WARNINGS
PARAMS = tinker.AdamParams(learning_rate=1e-2)


def _nll(_: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.cat(logprobs).sum(), {}


@pytest.fixture
def cut(tmp_path: Any, monkeypatch: Any) -> Iterator[Any]:
    """A service whose clients cut their data into threes."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setitem(client_config._CLIENT, "fwdbwd_max_chunk_len", 3)
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


def wait_for_a_step(models: ServedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no operation begin before the service has a step, so that it comes before its client can read of a failure."""
    arrived, submit, backend = threading.Event(), Sequencer.submit, models.backend

    def noticed(
        self: Any, owner: str, queue: str, number: Any, payload: bytes, kind: str, *given: Any, **more: Any
    ) -> str:
        request = submit(self, owner, queue, number, payload, kind, *given, **more)
        if kind == "optim_step":
            arrived.set()
        return request

    def waited(*given: Any, **more: Any) -> Any:
        assert arrived.wait(60)
        return backend(*given, **more)

    monkeypatch.setattr(Sequencer, "submit", noticed)
    monkeypatch.setattr(models, "backend", waited)


def test_a_pair_that_was_cut_is_refused(cut: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a pair says so; nothing of the call that can be refused is trained on in silence."""
    models, service = cut
    client = trainer(service)
    sent = client.forward_backward(to_tinker(read_by("dpo")), "dpo")
    with pytest.raises(tinker.RequestFailedError, match="has no partner; pairs are neighbours"):
        sent.result()
    client = trainer(service)
    wait_for_a_step(models, monkeypatch)
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
