"""Raw sockets: half requests, too many of them, two lengths, and a stop while somebody sends."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from servers import KEY, SDK_WARNINGS, new_model, rest, tiny_models

from pullback.service import serving
from pullback.service.http.connections import most_connections
from pullback.service.limits import Limits

pytestmark = SDK_WARNINGS
QUICK = Limits(header_seconds=0.5, body_seconds=0.5, connections=20, shutdown_seconds=1.0)
PATIENT = Limits(header_seconds=60.0, body_seconds=60.0, connections=40)
HEAD = b"POST /api/v1/create_session HTTP/1.1\r\nhost: x\r\nx-api-key: " + KEY.encode() + b"\r\n"
HALVES = {
    "nothing": b"",
    "half a line": b"GET /api/v1/hea",
    "half its headers": HEAD,
    "half its body": HEAD + b"content-length: 10\r\n\r\n{",
    "half a chunk": HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{",
}
GET = b"GET /api/v1/healthz HTTP/1.1\r\nhost: x\r\nx-api-key: " + KEY.encode() + b"\r\n\r\n"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that does not wait long."""
    with serving(tiny_models(tmp_path_factory.mktemp("quick")), keys=[KEY], limits=QUICK) as url:
        yield url


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that waits long, for few."""
    with serving(tiny_models(tmp_path_factory.mktemp("patient")), keys=[KEY], limits=PATIENT) as url:
        yield url


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that waits no longer for headers than the quick one, and long for bodies."""
    limits = replace(QUICK, body_seconds=60.0)
    with serving(tiny_models(tmp_path_factory.mktemp("steady")), keys=[KEY], limits=limits) as url:
        yield url


def opened(url: str, content: bytes = b"", seconds: float = 30.0) -> socket.socket:
    """Connect and send."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=seconds)
    connection.sendall(content)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def answer(connection: socket.socket) -> bytes:
    """Read one answer of a connection that stays open."""
    parts = b""
    while b"\r\n\r\n" not in parts or not parts.endswith(b"}"):
        part = connection.recv(1 << 16)
        if not part:
            break
        parts += part
    return parts


@pytest.mark.parametrize("case", HALVES)
def test_half_a_request_loses_its_connection(quick: str, case: str) -> None:
    """The server closes it; on a connection that was of use before, too."""
    with opened(quick, HALVES[case]) as connection:
        assert rest_of(connection) == b""
    if case == "nothing":
        return
    with opened(quick, GET) as connection:
        assert b"200 OK" in answer(connection)
        connection.sendall(HALVES[case])
        assert rest_of(connection) == b""


def test_bytes_that_trickle_do_not_help(quick: str) -> None:
    """One byte at a time keeps neither half a line nor half a body open."""
    for start in (b"GET /", HEAD + b"content-length: 9999\r\n\r\n"):
        with opened(quick, start) as connection, pytest.raises(ConnectionError):
            trickle(connection)


def trickle(connection: socket.socket) -> None:
    """Send a byte every now and then, for forty times as long as half a request has."""
    for _ in range(1000):
        connection.sendall(b"x")
        time.sleep(0.02)


def test_who_waits_for_the_server_is_not_closed(steady: str) -> None:
    """Negative control: a connection between two requests, and one whose whole body came in time, stay."""
    with opened(steady, GET) as connection:
        assert b"200 OK" in answer(connection)
        time.sleep(1.2)  # more than twice what half the headers have
        connection.sendall(GET)
        assert b"200 OK" in answer(connection)
        connection.sendall(HEAD + b"content-length: 2\r\n\r\n{")
        time.sleep(0.6)  # more than half the headers have
        connection.sendall(b"}")
        assert b"session_id" in answer(connection)


@pytest.mark.parametrize("halves", [100, pytest.param(1100, marks=pytest.mark.soak)])
def test_half_requests_do_not_keep_others_out(patient: str, halves: int) -> None:
    """Far more of them than the server has room for: a new connection is served at once, and one that was served before too."""
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(opened(patient, GET))
        assert b"200 OK" in answer(before)
        for i in range(halves):
            content = list(HALVES.values())[i % len(HALVES)]
            with contextlib.suppress(ConnectionError):  # it may be closed while it sends
                stack.enter_context(opened(patient, content))
        new = stack.enter_context(opened(patient, GET))
        assert b"200 OK" in answer(new)
        before.sendall(GET)
        assert b"200 OK" in answer(before)


def test_who_is_being_answered_is_not_closed_for_others(patient: str, web: Any) -> None:
    """A long poll keeps its place, however many come; where all are such, one more is told so."""
    http = web(patient)
    step = {"model_id": new_model(http)[1]["model_id"], "seq_id": 2, "adam_params": {}}
    request = http.post("optim_step", json=step).json()["request_id"]  # 1 has not come
    asked = json.dumps({"request_id": request}).encode()
    poll = HEAD.replace(b"create_session", b"retrieve_future") + b"content-length: %d\r\n\r\n" % len(asked) + asked
    http.close()
    with contextlib.ExitStack() as stack:
        polls: list[socket.socket] = []
        while not polls or b"503" not in (found := first_bytes(patient)):
            assert len(polls) < 10 * PATIENT.connections
            polls.append(stack.enter_context(opened(patient, poll)))
            time.sleep(0.005 * len(polls) / PATIENT.connections)  # it is read only then, where the machine is busy
        assert b"503 Service Unavailable" in found
        assert b"retry-after: 1" in found
        # Those that came before they were read may have been closed, the last of them only now.
        assert eventually(lambda: sum(map(is_held, polls)) == PATIENT.connections)
        next(filter(is_held, polls)).close()
        assert eventually(lambda: b"200 OK" in first_bytes(patient))


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something holds after a while, however slow the machine is."""
    until = time.monotonic() + 60.0
    while not (held := holds()) and time.monotonic() < until:
        time.sleep(0.05)
    return held


def first_bytes(url: str) -> bytes:
    """What a new connection is answered."""
    with opened(url, GET) as connection, contextlib.suppress(ConnectionError):
        return connection.recv(1 << 16)
    return b""


def is_held(connection: socket.socket) -> bool:
    """Whether it is open, and nothing has come."""
    connection.settimeout(0.02)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    return False


def test_two_lengths_are_refused(quick: str) -> None:
    """400, and the connection ends: what comes after is nobody's request."""
    smuggled = b"0\r\n\r\n" + GET
    both = HEAD + b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n" % len(smuggled)
    with opened(quick, both + smuggled) as connection:
        found = rest_of(connection)
    assert found.startswith(b"HTTP/1.1 400")
    assert b"send one of them" in found
    assert found.count(b"HTTP/1.1") == 1
    for one, body in ((b"content-length: 2", b"{}"), (b"transfer-encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n")):
        with opened(quick, HEAD + one + b"\r\n\r\n" + body) as connection:
            assert b"200 OK" in answer(connection)


def test_a_stop_does_not_wait_for_half_a_body(tmp_path: Path) -> None:
    """Nor for half a line, nor for a connection that does nothing, and a poll that goes on is ended after a while."""
    limits = Limits(header_seconds=600.0, body_seconds=600.0, shutdown_seconds=1.0, poll_seconds=600.0)
    ended = threading.Event()

    def stop(stack: contextlib.ExitStack) -> None:
        stack.close()
        ended.set()

    service = contextlib.ExitStack()
    url = service.enter_context(serving(tiny_models(tmp_path), keys=[KEY], limits=limits))
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(opened(url, content)) for content in HALVES.values()]
        with rest(url) as http:
            assert http.get("healthz").status_code == 200
        threading.Thread(target=stop, args=(service,), daemon=True).start()
        for connection in held:
            assert rest_of(connection) == b""
        assert ended.wait(120)


def test_connections_leave_files_for_the_rest() -> None:
    """Never more than the process may open; a limit of files that is low is felt, and a high one is not."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert most_connections(10) == 10
    if files != resource.RLIM_INFINITY:
        assert most_connections(files + 1) == max(16, files - 300)
