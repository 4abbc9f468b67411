"""Checkpoint names as Fireworks' fork of the SDK has them: no scheme, ``<account>/<run>/<name>`` or the bare name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, final

from ...errors import CheckpointError
from ..durability.checkpoints import SCHEME, Checkpoints
from ..durability.journal import Journal

__all__ = ["LogicalNames"]

_ACCOUNT: Final = "pullback"
_SHOWN: Final = 20  # names in a message


@final
class LogicalNames:
    """Turns the fork's names of an owner's checkpoints into URIs, and back."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def shown(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return an answer as the fork can use it: it refuses a path with a scheme."""
        path = answer.get("path")
        return answer | {"path": _qualified(path)} if isinstance(path, str) and path.startswith(SCHEME) else answer

    def listing(self, owner: str) -> list[str]:
        """Return all training checkpoints by the shortest name that `resolve` understands; it may wait for the disk."""
        return _shortest(self._journal.trainable_checkpoints(owner))

    def resolve(self, owner: str, model_id: str, path: Any) -> Any:
        """Return the URI that a path stands for; a bare name is the model's own checkpoint, else the only one so called.

        Raises:
            CheckpointError: there is none, or there are several.
        """
        if not isinstance(path, str) or path.startswith(SCHEME):
            return path
        rows = self._journal.named_checkpoints(owner, path.rpartition("/")[2])
        rows = [row for row in rows if path in (row["name"], _qualified(row["uri"]))]
        rows = [row for row in rows if row["model"] == model_id] or rows
        if len(rows) == 1:
            return rows[0]["uri"]
        if not rows:
            raise CheckpointError(f"there is no checkpoint {path!r}; {self._known(owner)}")
        several = sorted(_qualified(row["uri"]) for row in rows[:_SHOWN])
        raise CheckpointError(f"{path!r} is the name of several checkpoints ({len(rows)}); give one of {several}")

    def _known(self, owner: str) -> str:
        """Name an owner's checkpoints, as far as a message can hold them."""
        rows = self._journal.trainable_checkpoints(owner, _SHOWN + 1)
        more = f" and more, of which list_checkpoints tells{self._journal.caveat}" if len(rows) > _SHOWN else ""
        return f"those of this key are {_shortest(rows[:_SHOWN])}{more or self._journal.caveat}"


def _shortest(rows: Sequence[dict[str, Any]]) -> list[str]:
    times = Counter(row["name"] for row in rows)
    return sorted(row["name"] if times[row["name"]] == 1 else _qualified(row["uri"]) for row in rows)


def _qualified(uri: str) -> str:
    model, _, name = Checkpoints.parts(uri)
    return f"{_ACCOUNT}/run-{hashlib.sha256(model.encode()).hexdigest()[:32]}/{name}"
