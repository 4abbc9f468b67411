"""What a server that was killed has left, put in order before another one serves from its folder."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...backends.native.models.lora import LoraChoice, saved_config
from ...errors import CheckpointError, StorageError
from .answers import Accepted, Answer, Failure
from .checkpoints import Checkpoints
from .descriptions import Description
from .journal import Journal
from .storage import explained

__all__ = ["adopt", "lost", "recover", "sweep"]

_logger = logging.getLogger(__name__)
_OTHERS = ("models", "losses", "asample")  # queues that belong to no model: creations, and sampling


def recover(checkpoints: Checkpoints, journal: Journal) -> None:
    """End everything that was accepted and not ended: a save that is whole on the disk as done, all else as lost.

    A checkpoint that the journal does not know is taken into it.
    """
    checkpoints.tidy()
    for uri in journal.all_checkpoints():
        if not checkpoints.fingerprint(uri):
            journal.drop_checkpoint(uri)
    left = journal.unfinished()
    saved = [_saved(checkpoints, journal, operation) for operation in left]  # first: the failures name them
    adopt(checkpoints, journal)
    _describe(checkpoints, journal)
    sweep(checkpoints, journal)
    for operation, answer in zip(left, saved, strict=True):
        journal.finish(operation.request, answer or Failure(_lost(journal, operation.queue), "server"))
    journal.forget_saves()


def sweep(checkpoints: Checkpoints, journal: Journal) -> None:
    """Delete the checkpoints whose time to live has passed."""
    for uri in journal.expired(checkpoints.clock()):
        with checkpoints.changing:
            row = journal.checkpoint(uri)
            if row is None or row["expires"] is None or row["expires"] > checkpoints.clock():
                continue  # another sweep was first, or a save has put another checkpoint there
            with suppress(CheckpointError):  # it is gone already
                checkpoints.delete(uri)
            journal.drop_checkpoint(uri)


def adopt(checkpoints: Checkpoints, journal: Journal, owner: str | None = None) -> list[str]:
    """Take checkpoints on the disk that the journal does not know into it, with their models.

    Args:
        checkpoints: on the disk.
        journal: is told of them.
        owner: of those whose folders do not say whose they are, and whose models the journal does not know; None: these are
            left where they lie, in no listing, and a warning names them.

    Returns:
        Their URIs.
    """
    unknown = [(uri, path, Description.read(path)) for uri, path in checkpoints.all() if not _knows(journal, uri)]
    owners = {read.model: read.owner for _, _, read in unknown if read is not None}
    taken: list[str] = []
    left: list[str] = []
    for uri, path, read in unknown:
        description = read or _guessed(journal, uri, path, owners, owner)
        (left if description is None else taken).append(uri)
        if description is not None:
            _take(checkpoints, journal, uri, description)
    if left:
        _logger.warning(
            "%d checkpoints do not say whose they are, and nobody can reach them: %s; give them to an owner by "
            "`pullback serve --adopt OWNER`",
            *(len(left), ", ".join(left)),
        )
    return taken


def lost(journal: Journal, queue: str) -> str:
    """Say that what a model or session had in memory is gone, and what is left."""
    if queue.rsplit(":", 1)[-1] in _OTHERS:
        return (
            f"the server was restarted before this was done in {queue.rpartition(':')[0]}; nothing else is lost: ask again"
            f"{journal.caveat}"
        )
    last = journal.last_checkpoint(queue)
    left = f"the last durable checkpoint is {last}" if last else "there is no durable checkpoint"
    return (
        f"the server was restarted, and what {queue} had in memory is gone; {left}: make a new client from a checkpoint "
        f"and repeat what came after it{journal.caveat}"
    )


def _lost(journal: Journal, queue: str) -> str:
    try:
        return lost(journal, queue)
    except StorageError as error:  # an entry that it would name
        return str(error)


def _knows(journal: Journal, uri: str) -> bool:
    return journal.checkpoint(uri) is not None and _model(journal, uri) is not None


def _model(journal: Journal, uri: str) -> Any:
    """Return the row of a checkpoint's model; None: there is none, or it is damaged."""
    try:
        return journal.model(Checkpoints.parts(uri)[0])
    except StorageError:
        return None


def _guessed(journal: Journal, uri: str, path: Path, owners: dict[str, str], owner: str | None) -> Description | None:
    """Describe a checkpoint that an older version wrote, as far as it can be told; None: nobody knows whose it is."""
    (model, _, _), row = Checkpoints.parts(uri), _model(journal, uri)
    whose = row["owner"] if row is not None else owners.get(model, owner)
    moment = path.stat().st_mtime
    if whose is None:
        return None
    if row is None:
        try:
            lora = json.dumps(LoraChoice().as_saved(saved_config(path)).to_json())
        except CheckpointError:
            return None
        row = {"id": model, "owner": whose, "lora": lora, "metadata": "null", "created": moment, "origin": None}
    return Description.of(row, -1, "null", moment)


def _take(checkpoints: Checkpoints, journal: Journal, uri: str, description: Description) -> None:
    owner, model = description.owner, description.model
    if _model(journal, uri) is None:
        session, lora = model.rsplit(":train:", 1)[0], json.loads(description.lora)
        metadata, moment = json.loads(description.model_metadata), description.model_created
        journal.add_model(model, session, owner, lora, metadata, description.origin, created=moment)
    metadata, when = json.loads(description.metadata), {"expires": description.expires, "created": description.created}
    journal.add_checkpoint(uri, model, owner, description.number, checkpoints.size(uri), metadata, **when)


def _describe(checkpoints: Checkpoints, journal: Journal) -> None:
    """Let every checkpoint's folder say what the journal knows of it, as those of older versions do not."""
    for uri, path in checkpoints.all():
        row, model = journal.checkpoint(uri), _model(journal, uri)
        if row is not None and model is not None and Description.read(path) is None:
            description = Description.of(model, row["number"], row["metadata"], row["created"], row["expires"])
            with explained(checkpoints.root):
                description.write(path)


def _saved(checkpoints: Checkpoints, journal: Journal, operation: Accepted) -> Answer | None:
    """Complete a save whose checkpoint had taken its place before the end; None: it had not, or is no save."""
    begun = None if operation.number is None else journal.begun_save(operation.queue, operation.number)
    if begun is None or operation.number is None or checkpoints.fingerprint(begun["uri"]) in ("", begun["before"]):
        return None
    uri, row = begun["uri"], _model(journal, begun["uri"])
    description = Description.read(checkpoints.place(uri))
    if row is not None and (description is None or description.number != operation.number):
        description = Description.of(row, operation.number, begun["metadata"], checkpoints.clock(), begun["expires"])
        description.write(checkpoints.place(uri))
    metadata, size = json.loads(begun["metadata"]), checkpoints.size(uri)
    when = {"expires": begun["expires"], "created": None if description is None else description.created}
    journal.add_checkpoint(uri, operation.queue, operation.owner, operation.number, size, metadata, **when)
    answer = {"path": uri, "type": operation.kind}
    return answer | {"size_bytes": size} if operation.kind == "save_weights_external" else answer
