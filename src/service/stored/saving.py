"""Writing a checkpoint so that, whenever the server ends, it is known what lies there, whose it is and how long it stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from safetensors import SafetensorError

from ...errors import CheckpointError
from ..durability.descriptions import Description, expiry
from ..durability.journal import Journal
from ..durability.storage import explained, storage_error
from ..served.encryption import encrypted_size
from ..served.registry import ServedModels

__all__ = ["Save", "save"]


@final
@dataclass(frozen=True)
class Save:
    """What is to be saved.

    Attributes:
        owner, model, kind: of the checkpoint; see `Checkpoints`.
        number: of the operation; everything up to it is in the checkpoint.
        name: of the checkpoint.
        overwrite: a checkpoint of that name is replaced.
        metadata: what the client says of it.
        ttl: how long it stays, seconds; None: for ever.
        readers: the only ones that can read it, where there are any.
    """

    owner: str
    model: str
    kind: str
    number: int
    name: Any
    overwrite: bool = False
    metadata: Any = None
    ttl: Any = None
    readers: Sequence[Any] = ()


def save(
    models: ServedModels,
    journal: Journal,
    asked: Save,
    require_space: Callable[[str, int], None] | None = None,
) -> str:
    """Write a checkpoint and return its URI; the journal knows of it before and after, so that a kill between leaves no doubt.

    Args:
        models: of whom it is one.
        journal: is told of it.
        asked: what is saved.
        require_space: is asked first, and raises if the owner may not have so many bytes more; None: nobody is asked.

    Raises:
        CheckpointError: the name leaves the folder, or is taken.
        ConfigError: the time to live is none.
        StorageError: the disk is full, or cannot be written; nothing has changed.
    """
    checkpoints, now = models.checkpoints, models.checkpoints.clock()
    expires = expiry(asked.ttl, now)
    uri = checkpoints.uri(asked.model, asked.kind, asked.name)
    row, before = journal.model(asked.model), checkpoints.fingerprint(uri)
    metadata = json.dumps(asked.metadata)
    described = None if row is None else Description.of(row, asked.number, metadata, now, expires)
    if require_space is not None:
        with explained():
            size = _size(models, asked, described) - (checkpoints.size(uri) if before else 0)
        require_space(asked.owner, max(0, size))
    journal.begin_save(uri, asked.model, asked.number, before, asked.metadata, expires)
    with checkpoints.changing:  # a sweep must not take the new one for the one whose time has passed
        _write(models, asked, uri, described)
        written = checkpoints.size(uri)
        journal.add_checkpoint(
            uri, asked.model, asked.owner, asked.number, written, asked.metadata, expires=expires, created=now
        )
    return uri


def _size(models: ServedModels, asked: Save, described: Description | None) -> int:
    """Return how many bytes are about to be written."""
    size = models.backend(asked.model).checkpoint_bytes(everything=asked.kind == "weights")
    note = 0 if described is None else len(described.text().encode())
    return encrypted_size(size, asked.readers) + note


def _write(models: ServedModels, asked: Save, uri: str, described: Description | None) -> None:
    try:
        models.save(asked.model, asked.kind, asked.name, asked.overwrite, asked.readers)
        if described is not None:
            described.write(models.checkpoints.place(uri))
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise storage_error(error) from error
