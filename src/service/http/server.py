"""Running the service: in the foreground, or in a thread for the length of a ``with`` block."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...errors import ConfigError, ServiceError, require_extra
from ..limits import Keys, Limits
from ..served.registry import ServedModels
from .app import build_app
from .connections import bounded_protocol, one_length

__all__ = ["require_keys", "serve_forever", "serving"]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_START_SECONDS = 20.0
_BACKLOG = 128  # connections are accepted by so many at a time, each a file descriptor


def serve_forever(
    models: ServedModels,
    host: str,
    port: int,
    keys: Keys,
    limits: Limits | None = None,
    *,
    save_seconds: float | None = None,
    sockets: list[socket.socket] | None = None,
    ready: Callable[[], object] = lambda: None,
) -> None:
    """Serve until interrupted.

    Args:
        models: the models that are served.
        host, port: the address.
        keys: who is let in.
        limits: sizes and counts.
        save_seconds: see `build_app`.
        sockets: bound to the address; default: it is bound here.
        ready: is called when the folder is held and nothing is refused any more, just before clients are served.

    Raises:
        ConfigError: the address can be reached from elsewhere and there are no keys.
        StorageError: another server uses the folder, or it cannot be written.
    """
    server = _server(models, host, port, keys, limits, save_seconds)
    ready()
    server.run(sockets)


def require_keys(host: str, keys: Keys) -> None:
    """Refuse to serve everybody on an address that other machines can reach.

    Raises:
        ConfigError: it can be reached from elsewhere, and there are no keys.
    """
    if host not in _LOOPBACK and not keys:
        raise ConfigError(
            f"{host} can be reached from other machines: give at least one API key, or serve on 127.0.0.1"
        )


@contextmanager
def serving(
    models: ServedModels, *, keys: Sequence[str] = (), port: int = 0, limits: Limits | None = None
) -> Iterator[str]:
    """Serve on 127.0.0.1 in a thread; yield the base URL.

    Args:
        models: the models that are served.
        keys: API keys; none: everybody is let in.
        port: 0 = any that is free.
        limits: sizes and counts.

    Raises:
        ServiceError: the server did not come up.
    """
    # The protocol must be named: asyncio switches Nagle's algorithm off only then, and each answer would take 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as bound:
        bound.bind(("127.0.0.1", port))
        server = _server(models, "127.0.0.1", bound.getsockname()[1], Keys.of(keys), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise ServiceError("the server did not start")
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _server(
    models: ServedModels,
    host: str,
    port: int,
    keys: Keys,
    limits: Limits | None,
    save_seconds: float | None = None,
) -> Any:
    require_keys(host, keys)
    uvicorn = require_extra("uvicorn", "serve", "pullback serve")
    limits = limits or Limits()
    config = uvicorn.Config(
        one_length(build_app(models, keys, limits, save_seconds)),
        host=host,
        port=port,
        http=bounded_protocol(limits),
        ws="none",
        backlog=_BACKLOG,
        log_level="warning",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    return uvicorn.Server(config)
