"""What an answer holds and when it comes: sizes said first, results that are not there yet, no numbers that JSON lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import tinker
import zstandard
from served.gaps import Gaps
from servers import KEY, SDK_WARNINGS, finished, json_datum, new_model, tiny_models

from pullback.backends import TorchBackend
from pullback.backends.operations.futures import FinishedFuture
from pullback.errors import NotFoundError, ServiceError
from pullback.service import serving
from pullback.service.http.requests import refusal
from pullback.service.limits import Limits

pytestmark = SDK_WARNINGS


@pytest.fixture(scope="module")
def gaps() -> Iterator[Gaps]:
    with pytest.MonkeyPatch.context() as patch:
        yield Gaps(patch)


@pytest.fixture(scope="module")
def hurried(gaps: Gaps, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that does not hold a poll for long, and calls 9 bytes a large result."""
    limits = Limits(poll_seconds=0.3, large_bytes=9)
    with serving(tiny_models(tmp_path_factory.mktemp("hurried")), keys=[KEY], limits=limits) as address:
        yield address


def test_metrics_and_logs_hold_no_secrets(web: Any, url: str, caplog: Any) -> None:
    """Counters are there for Prometheus; neither they nor the log name a key or a token."""
    with caplog.at_level("INFO", "pullback.service"):
        http = web(url)
        session, made = new_model(http)
        sent = {"model_id": made["model_id"], "seq_id": 1, "forward_input": {"loss_fn": "cross_entropy"}}
        sent["forward_input"]["data"] = [json_datum([7, 7, 7])]
        finished(http, http.post("forward", json=sent).json()["request_id"])
        text = httpx.get(f"{url}/metrics", headers={"x-api-key": KEY}).text
    assert 'pullback_operations_total{kind="forward",outcome="done"}' in text
    assert 'pullback_amount_total{what="forward_tokens"}' in text
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert KEY not in text + caplog.text
    assert "[7, 7, 7]" not in text + caplog.text
    assert json.loads(caplog.messages[0])["route"] == "create_session"
    http.post(f"sessions/{session}/finish", json={})


def test_a_packed_body_is_whole(web: Any, url: str) -> None:
    """A zstd frame that is cut, or that something follows, is refused as a whole; one that is whole is read."""
    body = json.dumps({"user_metadata": {"words": "so much " * 5000}}).encode()
    packed = zstandard.compress(body)
    http = web(url)
    for content, status in ((packed, 200), (packed[:-1], 400), (packed + b"\0", 400), (packed + packed, 400)):
        answer = http.post("create_session", content=content, headers={"content-encoding": "zstd"})
        assert answer.status_code == status, answer.text


def test_large_results_are_announced(web: Any, hurried: str) -> None:
    """A client that can is told the size first; the SDK reads what it reads from any other service."""
    http = web(hurried)
    with tinker.ServiceClient(base_url=hurried, api_key=KEY) as service:
        trainer = service.create_lora_training_client("tiny", rank=2).result()
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
        )
        assert len(trainer.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data) == 3
        sent = {"model_id": trainer.model_id, "seq_id": 2, "forward_input": {"loss_fn": "cross_entropy"}}
        sent["forward_input"]["data"] = [json_datum([7, 7, 7])]
        request = {"request_id": http.post("forward", json=sent).json()["request_id"]}
        whole = [http.post("retrieve_future", json=request).content for _ in range(2)]  # a result can be read twice
        announced = http.post("retrieve_future", json={**request, "allow_metadata_only": True}).json()
    assert announced == {"status": "complete_metadata", "response_payload_size": len(whole[0])}
    assert whole[0] == whole[1]


def test_a_result_that_is_not_there_yet(gaps: Gaps, web: Any, hurried: str) -> None:
    """The request for it is held for a while, then answered 408 in the words that the SDK knows."""
    http = web(hurried)
    session, made = new_model(http)
    sent = {"model_id": made["model_id"], "seq_id": 2, "adam_params": {}}  # 1 has not come
    request = http.post("optim_step", json=sent).json()["request_id"]
    answer = http.post("retrieve_future", json={"request_id": request})
    assert answer.status_code == 408
    assert answer.json() == {"type": "try_again", "request_id": request, "queue_state": "active"}
    assert answer.elapsed.total_seconds() >= 0.3
    gaps.passed()
    assert "did not arrive" in finished(http, request)["error"]
    http.post(f"sessions/{session}/finish", json={})


def test_numbers_that_json_lacks_are_refused(web: Any, url: str) -> None:
    """NaN in metadata would make a listing that nobody can read."""
    http = web(url)
    session, made = new_model(http)
    bad = b'{"user_metadata": {"x": NaN}}'
    assert http.post("create_session", content=bad).status_code == 400
    save = json.dumps({"model_id": made["model_id"], "seq_id": 1, "path": "n"})[:-1] + ', "user_metadata": {"x": NaN}}'
    assert "JSON" in finished(http, http.post("save_weights", content=save).json()["request_id"])["error"]
    assert http.get("checkpoints?limit=1000").status_code == 200
    http.post(f"sessions/{session}/finish", json={})


def test_metrics_that_are_no_numbers(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and inf in metrics do not break what the SDK reads: JSON leaves them out, protobuf carries them."""
    trainer = service.create_lora_training_client("tiny", rank=2).result()
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 1.0]}
    )
    for verb in ("forward_backward", "optim_step"):
        monkeypatch.setattr(TorchBackend, verb, with_metrics(getattr(TorchBackend, verb)))
    result = trainer.forward_backward([datum], "cross_entropy").result()
    assert math.isnan(result.metrics["odd:sum"])
    step = trainer.optim_step(tinker.AdamParams()).result()
    assert "odd:sum" not in step.metrics
    assert step.metrics["even:sum"] == 1.0


def with_metrics(operation: Any) -> Any:
    """An operation that also reports NaN, inf and 1."""

    def reporting(*given: Any, **named: Any) -> Any:
        output = operation(*given, **named).result()
        odd = {"odd:sum": math.nan, "odder:sum": math.inf, "even:sum": 1.0}
        return FinishedFuture(replace(output, metrics={**output.metrics, **odd}))

    return reporting


def test_not_found_is_a_class_of_errors() -> None:
    """The status of a refusal does not depend on its words."""
    assert refusal(NotFoundError("nothing of that name")).status_code == 404
    assert refusal(ServiceError("there is no reason to find it missing")).status_code == 400
