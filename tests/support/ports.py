"""Ports for processes that tests start, which no other process is given meanwhile."""

from __future__ import annotations

import socket

__all__ = ["reserved_port"]

_HELD: list[socket.socket] = []


def reserved_port() -> int:
    """Return a port of 127.0.0.1 that is left to whoever binds it by its number, until this process ends.

    It stays bound here without listening: the system gives it to nobody who asks for any port, neither a server nor a
    client, and a server that reuses addresses, as torch's store and ``pullback serve`` do, can listen there.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _HELD.append(held)
    return int(held.getsockname()[1])
