"""Adapters that leave the server: addresses that are signed and short-lived, and what they lead to.

The SDK fetches them by a program of its own that sends no key: whoever has an address may read that one file until it expires.
An address leads to the checkpoint as it was then: once another has taken its name, it leads nowhere, so that nobody puts an
adapter together from two.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any, BinaryIO, Final, final
from urllib.parse import quote

from ...backends.native.checkpoints.files import MANIFEST
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
_REPLACED: Final = (
    "the checkpoint of this address was overwritten after it was given: ask for new addresses of all its files"
)
_VERSION: Final = 32  # characters of a fingerprint, which follow the signature
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
        version = self._version(uri)
        urls = {name: self._signed(call, uri, name, expires, version) for name in self._files(uri)}
        return json_response({"urls": urls, "expires": datetime.fromtimestamp(expires, UTC).isoformat()})

    async def archive(self, call: Call) -> Any:
        """Redirect to an archive of all files of an adapter."""
        from starlette.responses import Response

        uri, expires = self._listings.own(call.owner, call.path["id"], call.path["checkpoint"]), self._expiry()
        address = self._signed(call, uri, _ARCHIVE, expires, self._version(uri))
        return Response(status_code=302, headers={"location": address, "expires": formatdate(expires, usegmt=True)})

    async def file(self, request: Any) -> Any:
        """Answer a signed address."""
        from starlette.responses import StreamingResponse

        try:
            uri, name, version = self._verified(request)
            files = self._files(uri)
            opened = _opened(self._checkpoints.locate(uri), files if name == _ARCHIVE else [name], version)
        except NotFoundError as error:
            return json_response({"detail": str(error)}, 404)
        except OSError:  # it is gone, or is going; a `CheckpointError` is one too
            return json_response({"detail": _GONE}, 404)
        if name == _ARCHIVE:
            return StreamingResponse(_tar(opened), media_type="application/x-tar")
        about = {
            "content-length": str(os.fstat(opened[name].fileno()).st_size),
            "content-disposition": f'attachment; filename="{name}"',
        }
        return StreamingResponse(_parts(opened[name]), media_type="application/octet-stream", headers=about)

    def _expiry(self) -> int:
        return int(self._clock() + self._seconds)

    def _files(self, uri: str) -> list[str]:
        return sorted(file.name for file in self._checkpoints.locate(uri).iterdir() if file.name.startswith(_PUBLIC))

    def _version(self, uri: str) -> str:
        return self._checkpoints.fingerprint(uri)[:_VERSION]

    def _signed(self, call: Call, uri: str, name: str, expires: int, version: str) -> str:
        model, kind, checkpoint = self._checkpoints.parts(uri)
        path = "/".join(quote(part) for part in (model, kind, checkpoint, name))
        signature = self._signature(uri, name, expires, version)
        return f"{call.request.base_url}api/v1/downloads/{expires}/{signature}/{path}"

    def _verified(self, request: Any) -> tuple[str, str, str]:
        given = request.path_params
        uri = self._checkpoints.uri(given["model"], given["kind"], given["checkpoint"])
        version = given["signature"][-_VERSION:]
        ours = self._signature(uri, given["file"], given["expires"], version)
        # Bytes, as text that is not ASCII cannot be compared; and only what was signed here is read as a number.
        if not hmac.compare_digest(ours.encode(), given["signature"].encode()) or int(given["expires"]) < self._clock():
            raise NotFoundError(_GONE)
        return uri, given["file"], version

    def _signature(self, uri: str, name: str, expires: int | str, version: str) -> str:
        signed = hmac.new(self._secret, f"{expires} {uri} {name} {version}".encode(), hashlib.sha256)
        return signed.hexdigest() + version


def _opened(folder: Path, files: Sequence[str], version: str) -> dict[str, BinaryIO]:
    """Open files of one folder, whatever takes its name, or its place in the lists, while they are sent.

    Raises:
        NotFoundError: another checkpoint has taken its name.
        CheckpointError: one of them is gone.
    """
    with ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, handle)
            with os.fdopen(os.open(MANIFEST, os.O_RDONLY, dir_fd=handle), "rb") as manifest:
                found = hashlib.sha256(manifest.read()).hexdigest()[:_VERSION]
            if found != version:
                raise NotFoundError(_REPLACED)
            opened: dict[str, BinaryIO] = {}
            with ExitStack() as unless_all:
                for name in files:
                    opened[name] = unless_all.enter_context(os.fdopen(os.open(name, os.O_RDONLY, dir_fd=handle), "rb"))
                unless_all.pop_all()
            return opened
        except OSError as error:
            raise CheckpointError("it changed, or was deleted, meanwhile") from error


def _parts(opened: BinaryIO) -> Iterator[bytes]:
    with opened:
        while part := opened.read(_CHUNK):
            yield part


def _tar(files: Mapping[str, BinaryIO]) -> Iterator[bytes]:
    """Write an archive piece by piece, so that it takes no memory and no room on the disk.

    It bears no times, so that a checkpoint that is written again with the same content has the same archive.
    """
    for name, opened in files.items():
        with opened:
            header = tarfile.TarInfo(name)
            header.size = os.fstat(opened.fileno()).st_size
            yield header.tobuf()
            yield from _parts(opened)
            yield bytes(-header.size % tarfile.BLOCKSIZE)
    yield tarfile.TarInfo(_COMPLETE).tobuf()
    yield bytes(2 * tarfile.BLOCKSIZE)
