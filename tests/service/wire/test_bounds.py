"""Bodies are counted before they are decoded: protobuf by its lengths, JSON by its signs."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from clients.bodies import POSTS, json_bodies, proto_bodies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import SDK_WARNINGS, add_datum

from pullback.datums import Datum, ModelInput
from pullback.errors import DatumError, ServiceError, TooLargeError
from pullback.service.wire.json_bounds import JsonBounds, parse_json
from pullback.service.wire.json_form import _canonical
from pullback.service.wire.protobuf import decode_request, message
from pullback.service.wire.protobuf_bounds import RequestSummary, WireBounds

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
    summary = RequestSummary.of(counted, WIDE)
    assert "more than 8192 datums" in str(summary.excess)
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
    summary = RequestSummary.of(body, WIDE)
    assert summary.excess is None
    assert summary.datums == len(request.data)
    tokens = sum(len(chunk.encoded_text.tokens) // 4 for datum in request.data for chunk in datum.model_input)
    assert (summary.tokens, summary.model_id, summary.seq_id) == (tokens, "m", 1)
    assert RequestSummary.of(body, WireBounds(len(lengths), tokens, 1000, 0)).excess is None
    if lengths:
        assert "datums" in str(RequestSummary.of(body, WireBounds(len(lengths) - 1, tokens, 1000, 0)).excess)
    if tokens:
        assert "tokens" in str(RequestSummary.of(body, WireBounds(len(lengths), tokens - 1, 1000, 0)).excess)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_an_outline_reads_what_protobuf_reads(data: st.DataObject) -> None:
    """Distorted requests: what protobuf can parse has an summary with its datums, its model and its number."""
    body = data.draw(proto_bodies("m", 3))
    parsed = message("ForwardBackwardRequest")()
    try:
        parsed.ParseFromString(body)
    except Exception:
        return
    try:
        summary = RequestSummary.of(body, WIDE)
    except DatumError:
        assert (
            b"\x0b" in body or b"\x0c" in body or any(byte & 7 in (3, 4) for byte in body)
        )  # groups, which protobuf skips
        return
    assert summary.datums == len(parsed.data)
    assert summary.excess is not None or summary.model_id == parsed.model_id


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
        RequestSummary.of(body, WIDE)


def test_unknown_fields_and_sparse_tensors_are_counted() -> None:
    """A small body may not hold a million fields, nor stand for a hundred million numbers."""
    fields = RequestSummary.of(head() + b"\xf8\x01\x00" * 1000, WireBounds(9, 9, 1001, 0))
    assert "fields" in str(fields.excess)
    assert RequestSummary.of(head() + b"\xf8\x01\x00" * 999, WireBounds(9, 9, 1001, 0)).excess is None
    for rows, refused in ((4096, False), (4097, True)):
        request = message("ForwardBackwardRequest")(model_id="m")
        tensor = request.data.add().loss_fn_inputs["weights"]
        tensor.sparse_csr.values = b""
        tensor.shape.extend([rows, 1024])
        summary = RequestSummary.of(request.SerializeToString(), WIDE)
        assert (summary.excess is not None) == refused


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
