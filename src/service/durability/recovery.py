"""What a server that was killed has left, put in order before another one serves from its folder."""

from __future__ import annotations

import json

from .checkpoints import Checkpoints
from .journal import Answer, Failure, Journal, Operation

__all__ = ["lost", "recover"]

_OTHERS = ("models", "losses", "asample")  # queues that belong to no model: creations, and sampling


def recover(checkpoints: Checkpoints, journal: Journal) -> None:
    """End everything that was accepted and not ended: a save that is whole on the disk as done, all else as lost."""
    checkpoints.tidy()
    for uri in journal.all_checkpoints():
        if not checkpoints.fingerprint(uri):
            journal.drop_checkpoint(uri)
    left = journal.unfinished()
    saved = [_saved(checkpoints, journal, operation) for operation in left]  # first: the failures name them
    for operation, answer in zip(left, saved, strict=True):
        journal.finish(operation.request, answer or Failure(lost(journal, operation.queue), "server"))
    journal.forget_saves()


def lost(journal: Journal, queue: str) -> str:
    """Say that what a model or session had in memory is gone, and what is left."""
    if queue.rsplit(":", 1)[-1] in _OTHERS:
        return f"the server was restarted before this was done in {queue.rpartition(':')[0]}; nothing else is lost: ask again"
    last = journal.last_checkpoint(queue)
    left = f"the last durable checkpoint is {last}" if last else "there is no durable checkpoint"
    return (
        f"the server was restarted, and what {queue} had in memory is gone; {left}: make a new client from a checkpoint "
        "and repeat what came after it"
    )


def _saved(checkpoints: Checkpoints, journal: Journal, operation: Operation) -> Answer | None:
    """Complete a save whose checkpoint had taken its place before the end; None: it had not, or is no save."""
    begun = None if operation.number is None else journal.begun_save(operation.queue, operation.number)
    if begun is None or operation.number is None or checkpoints.fingerprint(begun["uri"]) in ("", begun["before"]):
        return None
    uri, metadata = begun["uri"], json.loads(begun["metadata"])
    journal.add_checkpoint(uri, operation.queue, operation.owner, operation.number, checkpoints.size(uri), metadata)
    return {"path": uri, "type": operation.kind}
