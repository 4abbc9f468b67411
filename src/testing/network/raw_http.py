"""As much of HTTP/1.1 as a proxy needs that breaks the protocol on purpose, which server libraries do not allow."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, final
from urllib.parse import urlsplit

__all__ = ["Request", "error_answer", "read_request", "send"]

_PREFIX: Final = "/api/v1/"


@final
@dataclass(frozen=True)
class Request:
    """A request as it arrived.

    Attributes:
        route: the path without the common prefix.
        head, body: its bytes.
    """

    route: str
    head: bytes
    body: bytes


async def read_request(reader: asyncio.StreamReader) -> Request:
    """Read a request and replace its headers about the connection."""
    start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    fields = {line.split(":", 1)[0].lower(): line.split(":", 1)[1].strip() for line in lines}
    if fields.pop("transfer-encoding", "") == "chunked":
        body = await _read_chunks(reader)
    else:
        body = await reader.readexactly(int(fields.get("content-length", 0)))
    fields |= {"content-length": str(len(body)), "connection": "close"}
    head = "\r\n".join([start, *(f"{key}: {value}" for key, value in fields.items())])
    path = urlsplit(start.split(" ")[1]).path
    return Request(path.removeprefix(_PREFIX), f"{head}\r\n\r\n".encode("latin-1"), body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


def error_answer(status: int) -> bytes:
    """Return the answer of a failing machine between client and service."""
    body = b'{"detail": "the network failed"}'
    head = (
        f"HTTP/1.1 {status} Error\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
    )
    return f"{head}\r\n\r\n".encode() + body


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write, and wait until it is sent."""
    writer.write(data)
    await writer.drain()
