"""What one client may ask of a service: keys, sizes, counts."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

from ..datums.types import Datum
from ..errors import ConfigError, ServiceError, TooLargeError, require_extra

__all__ = ["Keys", "Limits", "digest_of", "read_body"]

_MAX_WINDOW: Final = 1 << 27
_SLICE: Final = 1024  # bytes of a zstd frame that are unpacked at once


@final
@dataclass(frozen=True)
class Limits:
    """Sizes and counts.

    Args:
        body_bytes: of a request, after decompression.
        datums, tokens: of one operation.
        queue: operations that may wait or run.
        waiting: of these, one key's that wait for a missing number; never more than half of what it may queue.
        models, samplers, losses: that are kept in memory; losses are those made by ``create_custom_loss``.
        queue_per_key, models_per_key, samplers_per_key, losses_per_key: of these, one key's; None = see ``shared``.
        disk_per_key: bytes of one key's checkpoints; None = see ``shared``.
        shared: several keys use the server: one may have more only while it holds less than is left free.
        rank: of an adapter.
        samples: completions of one request.
        graph_bytes: graphs kept for custom losses; None = half of what is free when they are made.
        graph_seconds: how long they are kept.
        idle_seconds: a session silent for so long may lose its models to a new one.
        gap_seconds: how long operations wait for a missing number.
        poll_seconds: how long a request for a result waits before it must be asked for again.
        large_bytes: of a result: a client that can is told its size first, and asks for it when it has room.
    """

    body_bytes: int = 256_000_000
    datums: int = 8192
    tokens: int = 4_000_000
    queue: int = 1024
    waiting: int = 256
    models: int = 32
    samplers: int = 256
    losses: int = 1024
    queue_per_key: int | None = None
    models_per_key: int | None = None
    samplers_per_key: int | None = None
    losses_per_key: int | None = None
    disk_per_key: int | None = None
    shared: bool = False
    rank: int = 512
    samples: int = 1024
    graph_bytes: float | None = None
    graph_seconds: float = 60.0
    idle_seconds: float = 3600.0
    gap_seconds: float = 60.0
    poll_seconds: float = 30.0
    large_bytes: int = 1_000_000

    def check_data(self, data: Sequence[Datum]) -> None:
        """Check the size of one operation.

        Raises:
            TooLargeError: there is too much in it.
        """
        if len(data) > self.datums:
            raise TooLargeError(f"{len(data)} datums in one operation; this server takes {self.datums}")
        tokens = sum(len(datum.model_input) for datum in data)
        if tokens > self.tokens:
            raise TooLargeError(f"{tokens} tokens in one operation; this server takes {self.tokens}")


@final
class Keys:
    """API keys, kept as digests; an owner is named by the first half of his.

    Args:
        digests: SHA-256, hexadecimal. None at all: everybody is let in, as one owner.
    """

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = sorted({digest.strip().lower() for digest in digests if digest.strip()})
        for digest in self._digests:
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ConfigError(
                    f"a key's digest must be 64 hexadecimal digits, got {digest[:8]!r}... of {len(digest)}"
                )

    @classmethod
    def of(cls, keys: Iterable[str]) -> Self:
        """Take keys as they are."""
        return cls(digest_of(key) for key in keys)

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, key: str) -> str | None:
        """Return whom a key belongs to, in time that does not depend on it; None if nobody."""
        if not self._digests:
            return ""
        given, owner = digest_of(key), None
        for digest in self._digests:
            if hmac.compare_digest(given, digest):
                owner = digest[:32]
        return owner


def digest_of(key: str) -> str:
    """SHA-256 of a key; keys are long and random, so a slow hash would protect nothing."""
    return hashlib.sha256(key.encode()).hexdigest()


async def read_body(request: Any, limit: int) -> bytes:
    """Read a request's body, decompressed, and never more than ``limit`` bytes of it.

    Raises:
        TooLargeError: there is more.
        ServiceError: an encoding that is not known, or a broken one; or the client has gone before the end.
    """
    from starlette.requests import ClientDisconnect

    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLargeError(f"the body is larger than {limit} bytes")
            parts.append(part)
    except ClientDisconnect as error:
        raise ServiceError(f"the connection ended after {size} bytes of the body") from error
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return b"".join(parts)
    if encoding != "zstd":
        raise ServiceError(f"content-encoding {encoding!r} is not known here; zstd or none")
    return _unpacked(b"".join(parts), limit)


def _unpacked(body: bytes, limit: int) -> bytes:
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
    except zstandard.ZstdError as error:
        raise ServiceError(f"the body is no zstd frame: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise ServiceError("the body must be one whole zstd frame, and this is less or more")
    return b"".join(parts)
