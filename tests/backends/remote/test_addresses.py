"""An address where something else answers than a service: said in words, after a few requests, before the SDK is asked."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS

import pullback
from pullback.backends.remote import Capabilities
from pullback.backends.remote.connection import probe
from pullback.backends.remote.sdk.sdks import TinkerSdk
from pullback.errors import ConfigError, RemoteError

pytestmark = SDK_WARNINGS
CAPABILITIES = {"supported_models": [{"model_name": "tiny", "max_context_length": 64}]}


def http(status: int, content: str, kind: str = "text/html", more: str = "") -> bytes:
    body = content.encode()
    head = (
        f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{more}\r\n"
    )
    return head.encode() + body


@contextmanager
def answering(answer: Callable[[bytes], bytes | None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives to every request what ``answer`` says of it, None: nothing; yields host:port and the requests."""
    requests: list[bytes] = []
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                kept.append(connection)
                requests.append(connection.recv(65536))
                said = answer(requests[-1])
                if said is not None:
                    connection.sendall(said)
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}", requests
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


@pytest.fixture(autouse=True)
def no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK must not be reached."""

    def never(*_: Any) -> Any:
        raise AssertionError("the SDK was asked")

    monkeypatch.setattr(TinkerSdk, "connect", never)
    monkeypatch.setattr(probe, "_PAUSES", (0.01,) * 4)


OTHERS = {
    "a page": (http(200, "<!doctype html><title>Hello</title>"), r"HTTP 200 \(text/html, '<!doctype html><title>Hello"),
    "a page that is not there": (http(404, "<h1>Not Found</h1>"), r"HTTP 404 \(text/html, '<h1>Not Found"),
    "other JSON": (http(200, '{"jsonrpc": "2.0"}', "application/json"), "HTTP 200 .*jsonrpc"),
    "a list": (http(200, "[1, 2]", "application/json"), r"HTTP 200 .*\[1, 2\]"),
    "models that are none": (http(200, '{"supported_models": ["a"]}', "application/json"), "supported_models"),
    "a redirection": (
        http(301, "", more="location: https://example.org/\r\n"),
        "HTTP 301 to https://example.org/",
    ),
    "a refusal": (http(400, "Bad Request: https only", "text/plain"), "HTTP 400 .*https only"),
}


@pytest.mark.parametrize("given_capabilities", [None, Capabilities()], ids=["asked", "said"])
@pytest.mark.parametrize("kind", OTHERS)
def test_something_else_is_named(kind: str, given_capabilities: Capabilities | None) -> None:
    """What it answered, what was expected, at most three requests; also where the user has said what the service can do."""
    answer, words = OTHERS[kind]
    with answering(lambda _: answer) as (place, requests):
        with pytest.raises(RemoteError, match=rf"http://{place} answered GET .*{words}.*Tinker training API") as caught:
            pullback.connect(f"http://{place}", base_model="tiny", api_key=KEY, capabilities=given_capabilities)
        assert caught.value.category == "user"
        assert 1 <= len(requests) <= 3
        assert not any(b"create_session" in request for request in requests)


@given(
    status=st.sampled_from([200, 201, 204, 302, 400, 404, 405, 410, 418, 500, 503]),
    body=st.text(max_size=40) | st.recursive(st.none() | st.integers(), st.lists, max_leaves=3).map(json.dumps),
    kind=st.sampled_from(["text/html", "application/json", ""]),
)
def test_no_answer_reaches_the_sdk(status: int, body: str, kind: str) -> None:
    """Whatever is answered that lists no models is an error of ours in words, and never another exception."""
    with (
        answering(lambda _: http(status, "" if status in (204,) else body, kind)) as (place, requests),
        pytest.raises(RemoteError, match=f"http://{place}"),
    ):
        pullback.connect(f"http://{place}", base_model="tiny", api_key=KEY)
    assert len(requests) <= 5


def test_the_wrong_scheme() -> None:
    """https:// where plain HTTP is spoken, and http:// where TLS is; the latter answers by an alert that is no HTTP."""
    with answering(lambda _: http(400, "x")) as (place, requests):
        with pytest.raises(RemoteError, match=r"no TLS connection to https://.*plain http://"):
            pullback.connect(f"https://{place}", base_model="tiny", api_key=KEY)
        assert len(requests) == 1
    with (
        answering(lambda _: b"\x15\x03\x03\x00\x02\x02\x46") as (place, requests),
        pytest.raises(RemoteError, match=r"did not answer as a service does .*http:// or https://"),
    ):
        pullback.connect(f"http://{place}", base_model="tiny", api_key=KEY)


def test_a_port_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for all tries is bounded together: the second one is the last."""
    monkeypatch.setattr(probe, "_PATIENCE", 0.3)
    with answering(lambda _: None) as (place, requests):
        with pytest.raises(RemoteError, match=r"did not answer .*ReadTimeout"):
            pullback.connect(f"http://{place}", base_model="tiny", api_key=KEY)
        assert len(requests) <= 2


@pytest.mark.parametrize("address", ["127.0.0.1:8765", "localhost", "ftp://host", "http://", "", "http://[::1"])
def test_what_is_no_address(address: str) -> None:
    """Said before anything is sent."""
    with pytest.raises(ConfigError, match="no address of a service"):
        pullback.connect(address, base_model="tiny", api_key=KEY)


def test_what_is_a_service() -> None:
    """Negative control: one that lists its models, and one that knows the protocol's first question only, reach the SDK."""

    def plain(request: bytes) -> bytes:
        known = request.startswith(b"POST /api/v1/client/config")
        return http(200, "{}", "application/json") if known else http(404, "{}", "application/json")

    listed = http(200, json.dumps(CAPABILITIES), "application/json")
    for answer in (lambda _: listed, plain):
        with answering(answer) as (place, _), pytest.raises(AssertionError, match="the SDK was asked"):
            pullback.connect(f"http://{place}", base_model="tiny", api_key=KEY)
