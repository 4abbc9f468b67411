"""The ports of processes that tests start."""

from __future__ import annotations

import socket

import pytest
from ports import reserved_port


def test_a_reserved_port_is_left_to_who_reuses_it() -> None:
    """Nobody else can bind it; a server that reuses addresses listens there, and is reached."""
    port = reserved_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert client.getpeername() == ("127.0.0.1", port)
