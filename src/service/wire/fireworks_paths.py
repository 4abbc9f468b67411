"""Checkpoint names as Fireworks' fork of the SDK has them: no scheme, ``<account>/<run>/<name>`` or the bare name."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, Final, final

from ...errors import CheckpointError
from ..durability.checkpoints import Checkpoints
from ..durability.journal import Journal

__all__ = ["LogicalNames"]

_SCHEME: Final = "tinker://"
_ACCOUNT: Final = "pullback"


@final
class LogicalNames:
    """From the fork's names to URIs and back; they stand for checkpoints of one owner."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def shown(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return an answer as the fork can use it: it refuses a path with a scheme."""
        path = answer.get("path")
        return answer | {"path": _qualified(path)} if isinstance(path, str) and path.startswith(_SCHEME) else answer

    def listing(self, owner: str) -> list[str]:
        """Return all training checkpoints by the shortest name that `resolve` understands."""
        uris = [row["uri"] for row in self._rows(owner)]
        times = Counter(map(_name, uris))
        return sorted(_name(uri) if times[_name(uri)] == 1 else _qualified(uri) for uri in uris)

    def resolve(self, owner: str, model_id: str, path: Any) -> Any:
        """Return the URI that a path stands for; a bare name is the model's own checkpoint, else the only one so called.

        Raises:
            CheckpointError: there is none, or there are several.
        """
        if not isinstance(path, str) or path.startswith(_SCHEME):
            return path
        rows = [row for row in self._rows(owner) if path in (_name(row["uri"]), _qualified(row["uri"]))]
        rows = [row for row in rows if row["model"] == model_id] or rows
        if len(rows) == 1:
            return rows[0]["uri"]
        if not rows:
            raise CheckpointError(f"there is no checkpoint {path!r}; those of this key are {self.listing(owner)}")
        several = sorted(_qualified(row["uri"]) for row in rows)
        raise CheckpointError(f"{path!r} is the name of several checkpoints; give one of {several}")

    def _rows(self, owner: str) -> list[dict[str, Any]]:
        """Return the owner's checkpoints that training can go on from."""
        rows = self._journal.checkpoints(owner, None)
        return [row for row in rows if Checkpoints.parts(row["uri"])[1] == "weights"]


def _name(uri: str) -> str:
    return Checkpoints.parts(uri)[2]


def _qualified(uri: str) -> str:
    model, _, name = Checkpoints.parts(uri)
    return f"{_ACCOUNT}/run-{hashlib.sha256(model.encode()).hexdigest()[:32]}/{name}"
