"""Adapters that leave the server: addresses that are signed and short-lived, and what they lead to.

The SDK fetches them by a program of its own that sends no key: whoever has an address may read that one file until it expires.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any, BinaryIO, Final, final
from urllib.parse import quote

from ...errors import CheckpointError, NotFoundError
from ..durability.checkpoints import Checkpoints
from ..served.listings import Listings
from .requests import Call, json_response

__all__ = ["Downloads"]

_SECONDS: Final = 900.0
_PUBLIC: Final = ("adapter_", "trained_beside_adapter")  # optimizer, gradients and random state stay here
_ARCHIVE: Final = "archive.tar"
_COMPLETE: Final = "checkpoint_complete"  # an empty file that the SDK's command looks for in an archive
_CHUNK: Final = 1 << 20
_GONE: Final = "this address has expired, or is not one that this server gave: ask for another"
Json = dict[str, Any]


@final
class Downloads:
    """Signs addresses, and answers them.

    Args:
        checkpoints: where the files lie.
        listings: knows whose is what.
        seconds: that an address lives.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        listings: Listings,
        seconds: float = _SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._checkpoints, self._listings, self._seconds, self._clock = checkpoints, listings, seconds, clock
        self._secret = secrets.token_bytes(32)  # an address does not outlive the process

    async def urls(self, call: Call) -> Any:
        """Return an address for each file of an adapter."""
        uri, expires = self._listings.own(call.owner, call.path["id"], call.path["checkpoint"]), self._expiry()
        urls = {name: self._signed(call, uri, name, expires) for name in self._files(uri)}
        return json_response({"urls": urls, "expires": datetime.fromtimestamp(expires, UTC).isoformat()})

    async def archive(self, call: Call) -> Any:
        """Redirect to an archive of all files of an adapter."""
        from starlette.responses import Response

        uri, expires = self._listings.own(call.owner, call.path["id"], call.path["checkpoint"]), self._expiry()
        where = {"location": self._signed(call, uri, _ARCHIVE, expires), "expires": formatdate(expires, usegmt=True)}
        return Response(status_code=302, headers=where)

    async def file(self, request: Any) -> Any:
        """Answer a signed address."""
        from starlette.responses import FileResponse, StreamingResponse

        try:
            uri, name = self._verified(request)
            folder, files = self._checkpoints.locate(uri), self._files(uri)
            if name == _ARCHIVE:
                opened = _opened(folder, files)
                return StreamingResponse(_tar(opened), media_type="application/x-tar")
            if name in files:
                return FileResponse(folder / name, media_type="application/octet-stream", filename=name)
        except (NotFoundError, CheckpointError):
            pass
        return json_response({"detail": _GONE}, 404)

    def _expiry(self) -> int:
        return int(self._clock() + self._seconds)

    def _files(self, uri: str) -> list[str]:
        return sorted(file.name for file in self._checkpoints.locate(uri).iterdir() if file.name.startswith(_PUBLIC))

    def _signed(self, call: Call, uri: str, name: str, expires: int) -> str:
        model, kind, checkpoint = self._checkpoints.parts(uri)
        path = "/".join(quote(part) for part in (model, kind, checkpoint, name))
        return f"{call.request.base_url}api/v1/downloads/{expires}/{self._signature(uri, name, expires)}/{path}"

    def _verified(self, request: Any) -> tuple[str, str]:
        given = request.path_params
        uri = self._checkpoints.uri(given["model"], given["kind"], given["checkpoint"])
        ours = self._signature(uri, given["file"], given["expires"])
        # Bytes, as text that is not ASCII cannot be compared; and only what was signed here is read as a number.
        if not hmac.compare_digest(ours.encode(), given["signature"].encode()) or int(given["expires"]) < self._clock():
            raise NotFoundError(_GONE)
        return uri, given["file"]

    def _signature(self, uri: str, name: str, expires: int | str) -> str:
        return hmac.new(self._secret, f"{expires} {uri} {name}".encode(), hashlib.sha256).hexdigest()


def _opened(folder: Path, files: list[str]) -> dict[str, BinaryIO]:
    """Open all files of one folder, whatever takes its name, or its place in the lists, while they are sent."""
    opened: dict[str, BinaryIO] = {}
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        for name in files:
            opened[name] = os.fdopen(os.open(name, os.O_RDONLY, dir_fd=handle), "rb")
    except OSError as error:
        for file in opened.values():
            file.close()
        raise CheckpointError("it changed, or was deleted, meanwhile") from error
    finally:
        if handle is not None:
            os.close(handle)
    return opened


def _tar(files: Mapping[str, BinaryIO]) -> Iterator[bytes]:
    """Write an archive piece by piece, so that it takes no memory and no room on the disk."""
    for name, opened in files.items():
        with opened:
            header, about = tarfile.TarInfo(name), os.fstat(opened.fileno())
            header.size, header.mtime = about.st_size, int(about.st_mtime)
            yield header.tobuf()
            while part := opened.read(_CHUNK):
                yield part
            yield bytes(-header.size % tarfile.BLOCKSIZE)
    yield tarfile.TarInfo(_COMPLETE).tobuf()
    yield bytes(2 * tarfile.BLOCKSIZE)
