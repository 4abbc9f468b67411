"""What the service knows of a checkpoint, kept in the checkpoint's own folder: a journal can be made anew from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self, final

from ...errors import ConfigError

__all__ = ["Description", "expiry", "require_ttl"]

_FILE: Final = "served.json"
_SHORTEST, _LONGEST = 3600, 10 * 365 * 24 * 3600  # seconds, as the protocol has them


@final
@dataclass(frozen=True)
class Description:
    """Whose a checkpoint is, and what it holds.

    Attributes:
        owner: of the model.
        model: its id.
        number: everything up to this operation is in the checkpoint; -1 = not known.
        metadata: what the client said of the checkpoint, JSON.
        created, expires: seconds of the epoch; the latter None: it is kept.
        lora, model_metadata, model_created, origin: of the model, as the journal has them.
    """

    owner: str
    model: str
    number: int
    metadata: str
    created: float
    expires: float | None
    lora: str
    model_metadata: str
    model_created: float
    origin: str | None

    @classmethod
    def of(
        cls, model: Mapping[str, Any], number: int, metadata: str, created: float, expires: float | None = None
    ) -> Self:
        """Describe a checkpoint of a model, given its row of the journal."""
        names = {"lora": "lora", "metadata": "model_metadata", "created": "model_created", "origin": "origin"}
        known = {ours: model[theirs] for theirs, ours in names.items()}
        return cls(model["owner"], model["id"], number, metadata, created, expires, **known)

    def text(self) -> str:
        """Return what is written into a checkpoint's folder."""
        fields = asdict(self)
        return json.dumps({**fields, "checksum": _checksum(fields)})

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint's folder, over an earlier one, at once."""
        place, unfinished = folder / _FILE, folder / f".{_FILE}"
        with unfinished.open("w") as file:
            file.write(self.text())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, place)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what a folder says; None: nothing, as older versions left it, or nothing that can be believed."""
        with suppress(OSError, ValueError, TypeError):
            fields = json.loads((folder / _FILE).read_text())
            if fields.pop("checksum", None) == _checksum(fields):
                return cls(**fields)
        return None


def require_ttl(seconds: Any) -> int | None:
    """Return a time to live, seconds; None: for ever.

    Raises:
        ConfigError: it is no whole number from an hour to ten years.
    """
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not _SHORTEST <= seconds <= _LONGEST:
        raise ConfigError(
            f"ttl_seconds must be a whole number from {_SHORTEST} (an hour) to {_LONGEST} (ten years), or null to keep "
            f"the checkpoint, got {seconds!r}"
        )
    return seconds


def expiry(seconds: Any, now: float) -> float | None:
    """Return when a time to live ends, seconds of the epoch; None: never. See `require_ttl`."""
    ttl = require_ttl(seconds)
    return None if ttl is None else now + ttl


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()
