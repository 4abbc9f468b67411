"""Copies of checkpoints: another run's name for the same files, which stay when the first one is deleted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from ...backends.native.checkpoints.files import read_manifest
from ...errors import CheckpointError, ConfigError, ServiceError, UnsupportedError
from ..durability.checkpoints import Checkpoints
from ..durability.descriptions import Description, expiry
from ..durability.journal import Journal
from ..queueing.requirements import number_of
from ..queueing.sequencer import Sequencer
from ..served.listings import Listings
from ..served.sessions import Sessions
from ..wire.texts import require_writable

__all__ = ["Copies"]

Json = dict[str, Any]


@final
class Copies:
    """Copies checkpoints within one key's own.

    Args:
        checkpoints: where they lie.
        journal: knows every checkpoint and model.
        sequencer: is told that the run of a copy is not trained on.
        sessions: whose is what.
        listings: likewise.
        require_space: raises if an owner may not have so many bytes more.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        journal: Journal,
        sequencer: Sequencer,
        sessions: Sessions,
        listings: Listings,
        require_space: Callable[[str, int], None],
    ) -> None:
        self._require_space = require_space
        self._checkpoints, self._journal, self._sequencer = checkpoints, journal, sequencer
        self._sessions, self._listings = sessions, listings

    def copy(self, owner: str, body: Json, key: str) -> Json:
        """Copy a checkpoint into a run of its own; return its path.

        Args:
            owner: who asks.
            body: of the request.
            key: the same request has the same one, and is then answered as before; empty: it is new each time.

        Raises:
            NotFoundError: there is no such checkpoint, or it is another key's.
            ConfigError: no place for it was named, or its time to live cannot be.
            ServiceError: the run that it should get is another one's, or the key holds too much.
            UnsupportedError: something else was asked for that is not offered.
        """
        source = body["source_path"]
        model, kind, name = self._checkpoints.parts(source)
        self._listings.own(owner, model, f"{kind}/{name}")
        if body.get("weights_access_token") is not None:
            raise UnsupportedError("weights_access_token: a key of this server copies its own checkpoints only")
        require_writable("destination_project_id", body.get("destination_project_id"))
        expires = expiry(body.get("ttl_seconds"), self._checkpoints.clock())
        session, copied = self._place(owner, body, key)
        with self._checkpoints.changing:  # the same request may come twice at once
            uri, known = self._checkpoints.uri(copied, kind, name), self._journal.model(copied)
            if known is not None and (known["owner"], _copied_from(known)) != (owner, source):
                raise ServiceError(f"{copied!r} is another model already; give another model_seq_id")
            if self._journal.numbered(f"{session}:models", int(copied.rpartition(":")[2])) is not None:
                raise ServiceError(f"{copied!r} is a model that was asked for already; give another model_seq_id")
            if known is None or not self._checkpoints.fingerprint(uri):
                self._require_space(owner, self._checkpoints.size(source))
                self._note(owner, session, source, uri, self._link(owner, source, uri, body, expires))
            return {"tinker_path": uri}

    def _place(self, owner: str, body: Json, key: str) -> tuple[str, str]:
        """Return the session and the run that a copy belongs to."""
        if body.get("session_id") is not None:
            session = self._sessions.require(owner, body["session_id"])
            return session, f"{session}:train:{number_of(body, 'model_seq_id')}"
        if not isinstance(body.get("destination_project_id"), str):
            raise ConfigError("copy_weights needs destination_project_id, or session_id and model_seq_id")
        digest = hashlib.sha256(f"{owner} {key}".encode()).hexdigest()[:16] if key else secrets.token_hex(8)
        return f"sess-{digest}", f"sess-{digest}:train:0"

    def _note(self, owner: str, session: str, source: str, uri: str, said: Description) -> None:
        model, size = self._checkpoints.parts(uri)[0], self._checkpoints.size(uri)
        if self._journal.session_owner(session) is None:
            self._journal.add_session(session, owner, None)
        lora, run, metadata = map(json.loads, (said.lora, said.model_metadata, said.metadata))
        self._journal.add_model(model, session, owner, lora, run, source, created=said.created)
        self._journal.add_checkpoint(uri, model, owner, 0, size, metadata, expires=said.expires, created=said.created)
        self._sequencer.end(
            model, f"{model} holds a copy of {source} and is not trained on: create a client from {uri}"
        )

    def _described(self, owner: str, source: str, uri: str, body: Json, expires: float | None) -> Description:
        """Return whose the copy is: the files are the source's, that is not."""
        project, now = body.get("destination_project_id"), self._checkpoints.clock()
        metadata = {} if project is None else {"destination_project_id": project}
        made_by = self._journal.model(self._checkpoints.parts(source)[0])
        row = {
            "owner": owner,
            "id": self._checkpoints.parts(uri)[0],
            "lora": made_by["lora"] if made_by else "{}",
            "metadata": json.dumps({"copy_of": source, **metadata}, allow_nan=False),
            "created": now,
            "origin": source,
        }
        return Description.of(row, 0, json.dumps(metadata or None), now, expires)

    def _link(self, owner: str, source: str, uri: str, body: Json, expires: float | None) -> Description:
        """Give the same files another folder, which takes its place at once; return what it says of itself."""
        described = self._described(owner, source, uri, body, expires)
        folder, (model, kind, name) = self._checkpoints.locate(source), self._checkpoints.parts(uri)
        root = self._checkpoints.folder(model, kind)
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            _link_files(folder, scratch)
            missing = [file for file in read_manifest(scratch)["files"] if not (scratch / file).exists()]
            if missing:
                raise FileNotFoundError(errno.ENOENT, f"{missing[0]} was gone")
            described.write(scratch)
            if (root / name).exists() and self._journal.checkpoint(uri) is None:
                shutil.rmtree(root / name)  # of a copy that was put there and never noted
            os.rename(scratch, root / name)
            return described
        except BaseException as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise CheckpointError(
                f"{source} changed, or could not be copied ({error.strerror or 'it is not whole'}): ask again"
            ) from error


def _copied_from(row: Json) -> str | None:
    """What a run is a copy of; None: it is a model of its own, perhaps made from a checkpoint."""
    metadata = json.loads(row["metadata"])
    return row["origin"] if isinstance(metadata, dict) and metadata.get("copy_of") == row["origin"] else None


def _link_files(source: Path, target: Path) -> None:
    """Link every file, or copy it where the disk has no links; all are of one folder, even if another takes its name."""
    handle = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(handle):
            try:
                os.link(name, target / name, src_dir_fd=handle)
            except FileNotFoundError:
                raise
            except OSError:
                with (
                    open(os.open(name, os.O_RDONLY, dir_fd=handle), "rb") as read,
                    (target / name).open("wb") as written,
                ):
                    shutil.copyfileobj(read, written)
    finally:
        os.close(handle)
