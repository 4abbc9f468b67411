"""The bodies of all requests together, and what is refused over HTTP before any work."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import zstandard
from clients.bodies import JSON, PROTOBUF
from helpers import VOCAB
from served.gaps import Gaps
from servers import KEY, SDK_WARNINGS, finished, gradient_body, json_datum, new_model, tiny_models

from pullback.datums import Datum, ModelInput
from pullback.errors import BusyError, DatumError, TooLargeError
from pullback.service import serving
from pullback.service.http.bodies import BodyBudget, HeldBytes, read_body
from pullback.service.http.requests import Call
from pullback.service.limits import Limits, check_prompt
from pullback.service.wire.json_bounds import JsonBounds
from pullback.service.wire.protobuf import message

pytestmark = SDK_WARNINGS
LOOSE = JsonBounds(1 << 20, 100_000, 20_000)
EMPTY = b"\x1a\x00"  # a datum with nothing in it


class Sent:
    """A request whose body comes in parts; what is in memory is looked at after each."""

    def __init__(self, parts: list[bytes], **headers: str) -> None:
        self.parts, self.headers = parts, {key.replace("_", "-"): value for key, value in headers.items()}

    async def stream(self) -> Any:
        for part in self.parts:
            yield part


def test_all_bodies_together_are_bounded() -> None:
    """As they come, not as they are declared; released once; large ones leave room for small ones."""
    budget = BodyBudget(16 << 20)
    first, second, third = (HeldBytes(budget) for _ in range(3))
    part = bytes(1 << 20)
    asyncio.run(read_body(Sent([part] * 12, content_length=str(12 << 20)), 1 << 30, first))
    assert budget.used == 12 << 20
    with pytest.raises(BusyError, match="try again later"):
        asyncio.run(read_body(Sent([part] * 4), 1 << 30, second))
    asyncio.run(read_body(Sent([part]), 1 << 30, third))  # a small one
    second.release()
    first.release()
    first.release()
    assert budget.used == 1 << 20
    asyncio.run(read_body(Sent([part] * 12), 1 << 30, second))
    second.release()
    third.release()
    assert budget.used == 0


def test_a_bomb_is_charged_as_it_unpacks() -> None:
    """What unpacking makes counts from its first byte; what is refused holds nothing afterwards."""
    bomb = zstandard.compress(bytes(200_000_000))
    budget = BodyBudget(20_000_000)
    held = HeldBytes(budget)
    tracemalloc.start()
    with pytest.raises(TooLargeError, match="this server has"):
        asyncio.run(read_body(Sent([bomb], content_encoding="zstd"), 1 << 30, held))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert budget.used <= 20_000_000
    assert peak < 60_000_000
    held.release()
    assert budget.used == 0
    whole = zstandard.compress(bytes(10_000_000))
    assert len(asyncio.run(read_body(Sent([whole], content_encoding="zstd"), 1 << 30, held))) == 10_000_000
    assert budget.used == 10_000_000  # the packed form is gone


def test_a_declared_length_over_the_limit_is_not_read() -> None:
    """Refused by its header; the first part is never asked for."""

    class Unread(Sent):
        async def stream(self) -> Any:
            raise AssertionError("was read")
            yield b""

    with pytest.raises(TooLargeError, match="larger than 10 bytes"):
        asyncio.run(read_body(Unread([], content_length="11"), 10, HeldBytes(BodyBudget(100))))
    with pytest.raises(AssertionError, match="was read"):
        asyncio.run(read_body(Unread([], content_length="10"), 10, HeldBytes(BodyBudget(100))))


@pytest.fixture(scope="module")
def gaps() -> Iterator[Gaps]:
    with pytest.MonkeyPatch.context() as patch:
        yield Gaps(patch)


@pytest.fixture(scope="module")
def url(gaps: Gaps, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = tiny_models(tmp_path_factory.mktemp("bounds"))
    config: Any = models.base.model.config
    config.max_position_embeddings = 16
    with serving(models, keys=[KEY], limits=Limits(all_bodies_bytes=8_000_000, datums=50)) as address:
        yield address


def test_what_is_over_the_context_fails_before_any_work(web: Any, url: str) -> None:
    """A datum of 16 tokens is taken and one of 17 is not; a prompt and its completion alike."""
    http = web(url)
    session, made = new_model(http)
    for number, (length, taken) in enumerate(((16, True), (17, False)), 1):
        inner = {"data": [json_datum([1] * length)], "loss_fn": "cross_entropy"}
        sent = {"model_id": made["model_id"], "seq_id": number, "forward_input": inner}
        answer = finished(http, http.post("forward", json=sent).json()["request_id"])
        assert ("error" not in answer) == taken
    assert "datum 0 has 17 tokens; this model's context is 16" in answer["error"]
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = http.post("create_sampling_session", json=sampling).json()["sampling_session_id"]
    both, long = "a prompt of 10 tokens and max_tokens 7 make 17", "the prompt has 17 tokens"
    cases = ((10, 6, ""), (10, 7, both), (16, 1, ""), (17, 1, long), (16, None, ""), (17, None, long), (17, 9, long))
    for prompt, most, words in cases:
        sent = {"sampling_session_id": sampler, "prompt": {"chunks": [{"tokens": [1] * prompt}]}}
        answer = http.post("asample", json={**sent, "sampling_params": {"max_tokens": most}})
        assert answer.status_code == (400 if words else 200), answer.text
        if words:
            assert answer.json()["detail"] == f"{words}; this model's context is 16"
        else:
            assert "error" not in finished(http, answer.json()["request_id"])


def test_a_context_that_is_not_known_bounds_nothing() -> None:
    """Negative control of the check."""
    check_prompt(10**9, 10**9, None)
    Limits().check_data([Datum(ModelInput.from_ints([1] * 17), {})], None)
    with pytest.raises(DatumError, match="context"):
        Limits().check_data([Datum(ModelInput.from_ints([1] * 17), {})], 16)


def test_too_many_datums_fail_in_their_turn(web: Any, url: str) -> None:
    """The number of a refused request is used, so what comes after it runs; nothing of it is decoded."""
    http = web(url)
    _, made = new_model(http)
    body = (
        bytes(message("ForwardBackwardRequest")(model_id=made["model_id"], seq_id=1).SerializeToString())
        + EMPTY * 100_000
    )
    request = http.post("forward_backward", content=body, headers=PROTOBUF).json()["request_id"]
    again = http.post("forward_backward", content=body, headers=PROTOBUF).json()["request_id"]
    assert request == again
    assert "more than 50 datums" in finished(http, request)["error"]
    request = http.post("forward_backward", content=gradient_body(made["model_id"], 2, "ppo"), headers=PROTOBUF)
    assert "error" not in finished(http, request.json()["request_id"])


def test_the_service_is_busy_when_bodies_fill_its_memory(gaps: Gaps, web: Any, url: str) -> None:
    """A body over the memory of all is 429 and can come again; small requests are answered; nothing stays taken."""
    http = web(url)
    session, made = new_model(http)
    sent = {"model_id": made["model_id"], "seq_id": 2, "forward_input": {"data": [], "loss_fn": "x" * 2_000_000}}
    waiting = http.post("forward", content=json.dumps(sent), headers=JSON).json()["request_id"]  # 1 has not come
    busy = http.post("forward_backward", content=bytes(3_000_000), headers=PROTOBUF)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert http.get("healthz").status_code == 200
    gaps.passed()
    assert "did not arrive" in finished(http, waiting)["error"]
    assert http.post("forward_backward", content=b"\xff" * 3_000_000, headers=PROTOBUF).status_code == 400
    assert http.post("forward_backward", content=bytes(7_500_000), headers=PROTOBUF).status_code == 413
    assert "pullback_body_bytes 0.0" in httpx.get(f"{url}/metrics", headers={"x-api-key": KEY}).text
    http.post(f"sessions/{session}/finish", json={})


@pytest.mark.parametrize(
    "route", ["create_session", "optim_step", "save_weights", "create_custom_loss", "retrieve_future"]
)
def test_only_datums_and_prompts_may_be_large(web: Any, url: str, route: str) -> None:
    """Two megabytes elsewhere; and JSON of many little things is refused everywhere."""
    http = web(url)
    assert http.post(route, content=b" " * (1 << 21) + b"{", headers=JSON).status_code == 413
    answer = http.post(route, content=b'{"a":[' + b"{}," * 30_000 + b"{}]}", headers=JSON)
    assert (answer.status_code, "lists and objects" in answer.text) == (413, True)


def test_a_future_of_a_request_holds_its_bytes() -> None:
    """Until the operation has ended, and not longer."""
    budget, ended = BodyBudget(100), Future[int]()
    held = HeldBytes(budget)
    held.add(10)
    call = Call(SimpleNamespace(query_params={}, path_params={}), "me", b"", LOOSE, held)
    call.keep_until(ended)
    assert (call.keeps, budget.used) == (True, 10)
    ended.set_result(VOCAB)
    assert budget.used == 0
