"""Services to measure: one of our own in a process of its own, and a relay that counts the bytes to any."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final
from urllib.parse import urlsplit

__all__ = ["OwnService", "Wire", "own_service", "relay"]

_START_SECONDS = 120.0
_CHUNK = 1 << 16


@final
@dataclass(frozen=True)
class OwnService:
    """A service that runs here.

    Attributes:
        url: base URL.
        pid: its process.
    """

    url: str
    pid: int


@contextmanager
def own_service(model: str, name: str, token_budget: int, keys: Sequence[str] = ()) -> Iterator[OwnService]:
    """Run ``pullback serve`` on a free port of 127.0.0.1, for these API keys or for everybody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pullback.cli", "serve", "--model", model, "--name", name, "--port", str(port)]
        command += ["--token-budget", str(token_budget), "--checkpoints", folder]
        environment = {**os.environ, **({"PULLBACK_API_KEYS": ",".join(keys)} if keys else {})}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        try:
            _wait(process, port)
            yield OwnService(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.1)
    raise SystemExit("the service did not start; its own words are above")


@dataclass
class Wire:
    """Bytes that went through a relay, headers included."""

    up: int = 0
    down: int = 0

    def take(self) -> tuple[int, int]:
        """Return the bytes since the last time."""
        found, self.up, self.down = (self.up, self.down), 0, 0
        return found


@contextmanager
def relay(url: str) -> Iterator[tuple[str, Wire]]:
    """Forward connections to a service and count; yield the relay's URL and the counter.

    Raises:
        ValueError: the service is not reached in the clear, so that its name would not fit its certificate.
    """
    target = urlsplit(url)
    if target.scheme != "http":
        raise ValueError(f"bytes can be counted for http:// only, not for {url}")
    address, wire = (target.hostname or "", target.port or 80), Wire()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_accept, args=(listening, address, wire), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}{target.path}", wire


def _accept(listening: socket.socket, address: tuple[str, int], wire: Wire) -> None:
    with contextlib.suppress(OSError):  # closed at the end
        while True:
            near, _ = listening.accept()
            far = socket.create_connection(address)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pump, args=(near, far, wire, "up"), daemon=True).start()
            threading.Thread(target=_pump, args=(far, near, wire, "down"), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, wire: Wire, way: str) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(_CHUNK):
            setattr(wire, way, getattr(wire, way) + len(part))
            sink.sendall(part)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
