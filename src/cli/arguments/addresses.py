"""The address that ``--host`` and ``--port`` name."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from ...errors import ConfigError

__all__ = ["bound", "listen", "port_of"]

_BACKLOG: Final = 128  # the server sets its own when it takes over
_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Bind an address, so that it is known to be free before anything is loaded; yield its sockets, which do not listen yet.

    Args:
        host: an address of this machine, or a name, which may stand for several.
        port: 0 = any that is free.

    Raises:
        ConfigError: the host is none of this machine's, or the port is taken, not allowed, or none.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port must be a number from 0 (any that is free) to 65535, got {port}")
    refused: OSError | None = None
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        for family, place in _places(host, port):
            try:
                opened = stack.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
                _bind(opened, place, port_of(sockets) if sockets else port)
                sockets.append(opened)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise _unusable(host, port, error) from error
                refused = error  # localhost may be two addresses, of which the machine has one
        if not sockets:
            raise _unusable(host, port, refused)
        yield sockets


def listen(sockets: Sequence[socket.socket]) -> None:
    """Let clients connect.

    Raises:
        ConfigError: another server took the address in the meantime.
    """
    for each in sockets:
        try:
            each.listen(_BACKLOG)
        except OSError as error:
            host, port = each.getsockname()[:2]
            raise _unusable(host, port, error) from error


def port_of(sockets: Sequence[socket.socket]) -> int:
    """Return the port that sockets are bound to."""
    found: int = sockets[0].getsockname()[1]
    return found


def _places(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # the latter of a name with an empty part
        raise _unusable(host, port, error) from error
    return [(family, place) for family, _, _, _, place in found]


def _bind(opened: socket.socket, place: Any, port: int) -> None:
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server that has ended do not matter
    if opened.family == socket.AF_INET6:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    opened.bind((place[0], port, *place[2:]))


def _unusable(host: str, port: int, error: Exception | None) -> ConfigError:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return ConfigError(f"port {port} is taken: give --port another number, or 0 for any that is free")
    if number == errno.EACCES:
        return ConfigError(f"port {port} is not allowed to this user: give --port a number from 1024 on")
    why = getattr(error, "strerror", None) or error
    return ConfigError(f"--host must be an address of this machine, such as 127.0.0.1, got {host!r} ({why})")
