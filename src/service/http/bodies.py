"""Reading the bodies of requests: bounded one by one, and in the memory that all of them take together."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Final, final

from ...errors import BusyError, ServiceError, TooLargeError, require_extra

__all__ = ["BodyBudget", "HeldBytes", "read_body"]

_MAX_WINDOW: Final = 1 << 27
_SLICE: Final = 1024  # bytes of a zstd frame that are unpacked at once
_SMALL: Final = 1 << 20
_FOR_LARGE: Final = 7 / 8  # of the budget; the rest is for small bodies, which large ones cannot shut out


@final
class BodyBudget:
    """The bytes that the bodies of all requests take together, until they are answered or their operation has ended.

    Args:
        bytes: that they may take.

    Attributes:
        used: bytes that they take now.
    """

    def __init__(self, bytes: int) -> None:
        self._bytes, self._lock = bytes, threading.Lock()
        self.used = 0

    def add(self, held: int, more: int) -> None:
        """Take more bytes for a body that holds some already.

        Raises:
            BusyError: the others leave too little; nothing was taken.
            TooLargeError: there would be too little without the others, too.
        """
        most = self._bytes if held + more <= _SMALL else int(self._bytes * _FOR_LARGE)
        if held + more > most:
            raise TooLargeError(
                f"the request takes {held + more} bytes of memory; this server has {most} for all bodies"
            )
        with self._lock:
            if self.used + more > most:
                raise BusyError(f"the requests that are being read hold {self.used} bytes of {most}; try again later")
            self.used += more

    def remove(self, bytes: int) -> None:
        """Give bytes back."""
        with self._lock:
            self.used -= bytes


@final
class HeldBytes:
    """What one request takes of the budget; released once, however often it is asked to."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._bytes = budget, 0

    def add(self, more: int) -> None:
        """Take more bytes.

        Raises:
            BusyError: there are too few left.
        """
        self._budget.add(self._bytes, more)
        self._bytes += more

    def release(self, keep: int = 0) -> None:
        """Give back all but so many bytes."""
        given, self._bytes = self._bytes - keep, keep
        self._budget.remove(given)


async def read_body(request: Any, limit: int, held: HeldBytes) -> bytes:
    """Read a request's body, decompressed, and never more than ``limit`` bytes of it.

    Args:
        request: starlette's.
        limit: bytes.
        held: is charged for what is kept of it, as it comes.

    Raises:
        TooLargeError: there is more.
        BusyError: other requests hold too much.
        ServiceError: an encoding that is not known, or a broken one; or the client has gone before the end.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "zstd"):
        raise ServiceError(f"content-encoding {encoding!r} is not known here; zstd or none")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
        raise TooLargeError(f"the body is larger than {limit} bytes")
    body = await _received(request, limit, held)
    if encoding == "identity":
        return body
    unpacked = await asyncio.to_thread(_unpacked, body, limit, held)
    held.release(keep=len(unpacked))
    return unpacked


async def _received(request: Any, limit: int, held: HeldBytes) -> bytes:
    from starlette.requests import ClientDisconnect

    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLargeError(f"the body is larger than {limit} bytes")
            held.add(len(part))
            parts.append(part)
    except ClientDisconnect as error:
        raise ServiceError(f"the connection ended after {size} bytes of the body") from error
    # Of a large body, this lets others run meanwhile.
    return b"".join(parts) if size <= _SMALL else await asyncio.to_thread(b"".join, parts)


def _unpacked(body: bytes, limit: int, held: HeldBytes) -> bytes:
    """Unpack one whole zstd frame, a little at a time: what a slice unpacks to is bounded, whatever it claims."""
    zstandard = require_extra("zstandard", "serve", "the service")
    unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
    parts, size = [], 0
    try:
        for start in range(0, len(body), _SLICE):
            if unpacker.eof:
                raise ServiceError("the body must be one zstd frame, and goes on after its end")
            parts.append(unpacker.decompress(body[start : start + _SLICE]))
            size += len(parts[-1])
            if size > limit:
                raise TooLargeError(f"the body is larger than {limit} bytes when it is unpacked")
            held.add(len(parts[-1]))
    except zstandard.ZstdError as error:
        raise ServiceError(f"the body is no zstd frame: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise ServiceError("the body must be one whole zstd frame, and this is less or more")
    return b"".join(parts)
