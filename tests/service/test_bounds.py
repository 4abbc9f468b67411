"""Bodies are counted before they are decoded: protobuf by its lengths, JSON by its signs, all of them together by bytes."""

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
from bodies import JSON, POSTS, PROTOBUF, json_bodies, proto_bodies
from helpers import VOCAB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS, add_datum, finished, gradient_body, json_datum, new_model, tiny_models

from pullback.datums import Datum, ModelInput
from pullback.errors import BusyError, DatumError, ServiceError, TooLargeError
from pullback.service import serving
from pullback.service.http.bodies import BodyBudget, HeldBytes, read_body
from pullback.service.http.requests import Call
from pullback.service.limits import Limits, check_prompt
from pullback.service.wire.framing import Outline, WireBounds
from pullback.service.wire.json_bounds import JsonBounds, parse_json
from pullback.service.wire.json_form import _canonical
from pullback.service.wire.protobuf import decode_request, message

pytestmark = SDK_WARNINGS
WIDE = WireBounds(8192, 4_000_000, 800_000, 1 << 22)
LOOSE = JsonBounds(1 << 20, 100_000, 20_000)
EMPTY = b"\x1a\x00"  # a datum with nothing in it


class Read:
    """Counts how much of a body is looked at."""

    def __init__(self, body: bytes) -> None:
        self._body, self.reads = body, 0

    def __len__(self) -> int:
        return len(self._body)

    def __getitem__(self, at: Any) -> Any:
        self.reads += 1
        return self._body[at]


def head(model: str = "m", number: int = 7) -> bytes:
    return bytes(message("ForwardBackwardRequest")(model_id=model, seq_id=number).SerializeToString())


def test_a_million_empty_datums_are_not_decoded() -> None:
    """Refused after reading 8,192 of them, two bytes each, in the memory of a list of those; its number is kept."""
    body = head() + EMPTY * 1_000_000
    counted: Any = Read(body)
    outline = Outline.of(counted, WIDE)
    assert "more than 8192 datums" in str(outline.excess)
    assert counted.reads < 2 * 8192 + 100
    tracemalloc.start()
    request = decode_request(body, bounds=WIDE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000
    assert (request.model_id, request.seq_id) == ("m", 7)
    with pytest.raises(TooLargeError, match="8192 datums"):
        request.data()
    with pytest.raises(TooLargeError, match="8192 datums"):
        decode_request(EMPTY * 1_000_000, bounds=WIDE)  # whose it is comes nowhere


def request_of(lengths: list[int], chunks: int = 1) -> Any:
    """A request of datums with so many tokens, in so many chunks each."""
    request = message("ForwardBackwardRequest")(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for length in lengths:
        add_datum(request, Datum(ModelInput.from_ints([1] * length), {"weights": [1.0] * length}))
        for _ in range(chunks - 1):
            request.data[-1].model_input.add().encoded_text.tokens = b"\1\0\0\0" * length
    return request


@given(lengths=st.lists(st.integers(0, 9), max_size=6), chunks=st.integers(1, 3))
def test_an_outline_counts_what_decoding_counts(lengths: list[int], chunks: int) -> None:
    """Both sides of each bound, by an independent reader of the same bytes."""
    request = request_of(lengths, chunks)
    body = request.SerializeToString()
    outline = Outline.of(body, WIDE)
    assert outline.excess is None
    assert outline.datums == len(request.data)
    tokens = sum(len(chunk.encoded_text.tokens) // 4 for datum in request.data for chunk in datum.model_input)
    assert (outline.tokens, outline.model_id, outline.seq_id) == (tokens, "m", 1)
    assert Outline.of(body, WireBounds(len(lengths), tokens, 1000, 0)).excess is None
    if lengths:
        assert "datums" in str(Outline.of(body, WireBounds(len(lengths) - 1, tokens, 1000, 0)).excess)
    if tokens:
        assert "tokens" in str(Outline.of(body, WireBounds(len(lengths), tokens - 1, 1000, 0)).excess)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_an_outline_reads_what_protobuf_reads(data: st.DataObject) -> None:
    """Distorted requests: what protobuf can parse has an outline with its datums, its model and its number."""
    body = data.draw(proto_bodies("m", 3))
    parsed = message("ForwardBackwardRequest")()
    try:
        parsed.ParseFromString(body)
    except Exception:
        return
    try:
        outline = Outline.of(body, WIDE)
    except DatumError:
        assert (
            b"\x0b" in body or b"\x0c" in body or any(byte & 7 in (3, 4) for byte in body)
        )  # groups, which protobuf skips
        return
    assert outline.datums == len(parsed.data)
    assert outline.excess is not None or outline.model_id == parsed.model_id


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\x1a\x05ab", "ends after"),
        (b"\x1a", "in the middle"),
        (b"\xff" * 11, "ten bytes"),
        (b"\x0a\x01\xff", "in the middle"),
        (b"\x0b", "wire type 3"),
    ],
)
def test_bytes_that_are_no_message(body: bytes, words: str) -> None:
    """Each is the client's mistake."""
    with pytest.raises(DatumError, match=words):
        Outline.of(body, WIDE)


def test_unknown_fields_and_sparse_tensors_are_counted() -> None:
    """A small body may not hold a million fields, nor stand for a hundred million numbers."""
    fields = Outline.of(head() + b"\xf8\x01\x00" * 1000, WireBounds(9, 9, 1001, 0))
    assert "fields" in str(fields.excess)
    assert Outline.of(head() + b"\xf8\x01\x00" * 999, WireBounds(9, 9, 1001, 0)).excess is None
    for rows, refused in ((4096, False), (4097, True)):
        request = message("ForwardBackwardRequest")(model_id="m")
        tensor = request.data.add().loss_fn_inputs["weights"]
        tensor.sparse_csr.values = b""
        tensor.shape.extend([rows, 1024])
        outline = Outline.of(request.SerializeToString(), WIDE)
        assert (outline.excess is not None) == refused


DEEP = b"[" * 64 + b"]" * 64
LARGE: dict[str, tuple[bytes, str]] = {
    "objects": (b"[" + b"{}," * 20_000_000 + b"{}]", "lists and objects"),
    "lists": (b"[" * 60_000_000, "lists and objects"),
    "numbers": (b"[" + b"1," * 30_000_000 + b"1]", "values"),
    "strings": (b"[" + b'"",' * 20_000_000 + b'""]', "quotation marks"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE)
def test_sixty_megabytes_of_little_things(case: str) -> None:
    """Refused before anything is parsed: no memory at all beside the body."""
    body, words = LARGE[case]
    tracemalloc.start()
    with pytest.raises(TooLargeError, match=words):
        parse_json(body, JsonBounds(256_000_000, 16_000_000, 327_680))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("body", "bounds", "words"),
    [
        (b"[1,2,3]", JsonBounds(6, 9, 9), "6 bytes"),
        (b"[[],[]]", JsonBounds(99, 99, 2), "2 lists"),
        (b"[1,2,3]", JsonBounds(99, 3, 9), "3 values"),
        (DEEP, JsonBounds(999, 999, 999, depth=63), "63 lists and objects in each other"),
        (b'{"a": [1,2,3,4,5,6,7]}', JsonBounds(99, 99, 99, flat=5), "5 values in a row"),
    ],
)
def test_json_is_bounded_on_both_sides(body: bytes, bounds: JsonBounds, words: str) -> None:
    """One more than each bound is refused, and what is just within is parsed."""
    with pytest.raises(TooLargeError, match=words):
        parse_json(body, bounds)
    one_more = JsonBounds(bounds.bytes + 1, bounds.values + 2, bounds.containers + 1, bounds.depth + 1, bounds.flat + 1)
    assert parse_json(body, one_more) == json.loads(body)


@given(text=st.text(alphabet='[]{},:"\\ab', max_size=40))
def test_what_stands_in_strings_is_not_counted(text: str) -> None:
    """Brackets, commas and quotation marks of a text are text."""
    body = json.dumps({text: [text, {text: text}]}).encode()
    assert parse_json(body, JsonBounds(1000, 10, 3, depth=3)) == json.loads(body)
    with pytest.raises(TooLargeError):
        parse_json(body, JsonBounds(1000, 10, 2, depth=3))


@given(data=st.data())
@settings(suppress_health_check=list(HealthCheck))
def test_json_means_what_it_meant(data: st.DataObject) -> None:
    """Almost valid bodies: parsed as the standard library parses them, or refused where it refuses."""
    body = data.draw(json_bodies(POSTS[data.draw(st.sampled_from(sorted(POSTS)))]))
    try:
        expected = json.loads(body)
    except (ValueError, RecursionError):
        with pytest.raises(ServiceError):
            parse_json(body, LOOSE)
        return
    try:
        found = parse_json(body, LOOSE)
    except ServiceError:
        assert json.dumps(expected).count("[") + json.dumps(expected).count("{") > 64  # it is nested deeply
        return
    assert repr(found) == repr(expected)


entries = st.integers() | st.dictionaries(st.text(max_size=3), st.floats(), max_size=3)


@given(inner=st.dictionaries(st.text(max_size=4) | st.just("data"), st.lists(entries, max_size=3) | st.none()))
def test_a_request_that_comes_again_is_the_same(inner: Any) -> None:
    """Written in pieces, its canonical form is what it was when it was written at once, as old journals have it."""
    assert b"".join(_canonical(inner)) == json.dumps(inner, sort_keys=True).encode()


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
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = tiny_models(tmp_path_factory.mktemp("bounds"))
    config: Any = models.base.model.config
    config.max_position_embeddings = 16
    with serving(models, keys=[KEY], limits=Limits(all_bodies_bytes=8_000_000, gap_seconds=0.5, datums=50)) as address:
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
    for prompt, most, status in ((10, 6, 200), (10, 7, 400), (16, 1, 200), (17, 1, 400), (16, None, 200)):
        sent = {"sampling_session_id": sampler, "prompt": {"chunks": [{"tokens": [1] * prompt}]}}
        answer = http.post("asample", json={**sent, "sampling_params": {"max_tokens": most}})
        assert answer.status_code == status, answer.text
        if status == 200:
            assert "error" not in finished(http, answer.json()["request_id"])
        else:
            assert "context is 16" in answer.json()["detail"]


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
    body = head(made["model_id"], 1) + EMPTY * 100_000
    request = http.post("forward_backward", content=body, headers=PROTOBUF).json()["request_id"]
    again = http.post("forward_backward", content=body, headers=PROTOBUF).json()["request_id"]
    assert request == again
    assert "more than 50 datums" in finished(http, request)["error"]
    request = http.post("forward_backward", content=gradient_body(made["model_id"], 2, "ppo"), headers=PROTOBUF)
    assert "error" not in finished(http, request.json()["request_id"])


def test_the_service_is_busy_when_bodies_fill_its_memory(web: Any, url: str) -> None:
    """A body over the memory of all is 429 and can come again; small requests are answered; nothing stays taken."""
    http = web(url)
    session, made = new_model(http)
    sent = {"model_id": made["model_id"], "seq_id": 2, "forward_input": {"data": [], "loss_fn": "x" * 2_000_000}}
    waiting = http.post("forward", content=json.dumps(sent), headers=JSON).json()["request_id"]  # 1 has not come
    busy = http.post("forward_backward", content=bytes(3_000_000), headers=PROTOBUF)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert http.get("healthz").status_code == 200
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
