"""Connections that wait for their client: for how long, and how many of them."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

from ...errors import require_extra
from ..limits import Limits

__all__ = ["bounded_protocol", "most_connections", "one_length"]

_LEAST: Final = 480_000  # bytes of a body in each period
_OTHER_FILES: Final = 300  # that the process has open or is about to accept
_FEWEST: Final = 16
_FULL: Final = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_Protocol: Any = object  # uvicorn's, which is imported where it is needed, comes after it in the order of bases


def most_connections(wanted: int) -> int:
    """Return how many connections may be open, so that the process never runs out of file descriptors."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else min(wanted, max(_FEWEST, files - _OTHER_FILES))


def one_length(app: Any) -> Any:
    """Refuse requests that say twice, by Content-Length and Transfer-Encoding, where their body ends.

    Two servers in a row may believe one each, and take the rest of the body for a request of its own.
    """

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        if scope["type"] != "http" or not {b"content-length", b"transfer-encoding"} <= names:
            await app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        detail = "the request has both Content-Length and Transfer-Encoding; send one of them"
        await JSONResponse({"detail": detail}, 400, {"connection": "close"})(scope, receive, send)

    return guarded


def bounded_protocol(limits: Limits) -> Any:
    """Return uvicorn's protocol, on whose connections a client that stops in the middle of a request is not waited for.

    Args:
        limits: ``connections``, ``header_seconds`` and ``body_seconds`` of them.
    """
    require_extra("uvicorn", "serve", "pullback serve")
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    states = {"idle": h11.IDLE, "reading": h11.SEND_BODY}
    own = {"limits": limits, "most": most_connections(limits.connections), **states}
    return type("BoundedProtocol", (_Bounded, H11Protocol), own)


class _Bounded(_Protocol):  # type: ignore[misc]
    """One connection over one of uvicorn's; its timer runs while the server waits for the rest of a request.

    Attributes:
        limits: ``header_seconds`` and ``body_seconds`` of it.
        most: connections that may be open.
        idle, reading: h11's states between requests, and in the middle of a body.
    """

    limits: Limits
    most: int
    idle: Any
    reading: Any

    timer: asyncio.TimerHandle | None = None
    waiting: Any = None  # for which part of a request
    received = 0  # bytes since the timer began
    since = 0.0  # of the last byte

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.since = self.loop.time()
        opened = [other for other in self.connections if not other.transport.is_closing()]
        if len(opened) > self.most:
            self._make_room(opened)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self.since = self.loop.time()
        self.received += len(data)
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End at once where the rest of a request is missing; uvicorn would wait for it."""
        if self.waits and not self.transport.is_closing():
            self.transport.abort()
        else:
            super().shutdown()

    @property
    def waits(self) -> bool:
        """Whether it is the client's turn."""
        return self.cycle is None or self.cycle.response_complete or self.conn.their_state is self.reading

    @property
    def served(self) -> bool:
        """Whether it has been of use, and no request has begun since."""
        return self.cycle is not None and self.cycle.response_complete

    def _make_room(self, opened: list[Any]) -> None:
        """Close the connection that has waited longest for its client: first those in the middle of a request."""
        others = [other for other in opened if other is not self and other.waits]
        if others:
            min(others, key=lambda other: (other.served, other.since)).transport.abort()
        else:
            self.transport.write(_FULL)
            self.transport.close()

    def _watch(self) -> None:
        """Run the timer for the part of a request that is missing; between requests, keep-alive has its own."""
        state = self.conn.their_state
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        part = state if state is self.reading or (state is self.idle and begun) else None
        if part is self.waiting and (part is None or self.timer is not None):
            return
        self._stop()
        self.waiting = part
        if part is not None and not self.transport.is_closing():
            seconds = self.limits.body_seconds if part is self.reading else self.limits.header_seconds
            self.received = 0
            self.timer = self.loop.call_later(seconds, self._expired)

    def _expired(self) -> None:
        self.timer = None
        if self.waiting is self.reading and self.received >= _LEAST:
            self._watch()
        elif not self.transport.is_closing():
            self.transport.abort()

    def _stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
