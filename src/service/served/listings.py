"""What a client may ask about: training runs, checkpoints, sessions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, final

from ...backends.native.models.lora import LoraChoice
from ...errors import NotFoundError
from ..durability.checkpoints import SCHEME, Checkpoints
from ..durability.descriptions import Description, expiry
from ..durability.journal import Journal
from ..durability.recovery import sweep
from ..durability.storage import explained
from .owned import own_model, own_session
from .registry import ServedModels

__all__ = ["Listings"]

Json = dict[str, Any]
_PAGE: Final = 20
_MOST: Final = 10_000  # rows of a page
_KINDS: Final = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


@final
class Listings:
    """Answers from the journal, of one owner at a time; they may wait for the disk, so they are not for the event loop.

    A list of which entries may have been lost with a damaged journal says so under ``notice``.
    """

    def __init__(self, models: ServedModels, journal: Journal) -> None:
        self._models, self._journal = models, journal

    def runs(self, owner: str, query: Mapping[str, str]) -> Json:
        """Return an owner's models, alive or not, a page at a time."""
        sweep(self._models.checkpoints, self._journal)
        limit, offset = _page(query)
        rows = [self._run(row) for row in self._journal.models(owner, limit, offset)]
        return self._listed("training_runs", rows) | _cursor(query, self._journal.total("models", owner))

    def run(self, owner: str, model_id: str) -> Json:
        """Return one model."""
        sweep(self._models.checkpoints, self._journal)
        return self._run(own_model(self._journal, owner, model_id))

    def checkpoints(self, owner: str, query: Mapping[str, str], model_id: str | None = None) -> Json:
        """Return the checkpoints of one model, or of all, a page at a time."""
        sweep(self._models.checkpoints, self._journal)
        if model_id is None:
            total = self._journal.total("checkpoints", owner)
        else:
            own_model(self._journal, owner, model_id)
            total = self._journal.checkpoints_in(model_id)
        rows = [_checkpoint(row) for row in self._journal.checkpoints(owner, model_id, *_page(query))]
        return {"checkpoints": rows} | _cursor(query, total)

    def delete(self, owner: str, model_id: str, checkpoint_id: str) -> None:
        """Remove a checkpoint from the disk."""
        uri = self.own(owner, model_id, checkpoint_id)
        with explained():
            self._models.checkpoints.delete(uri)
        self._journal.drop_checkpoint(uri)

    def own(self, owner: str, model_id: str, checkpoint_id: str) -> str:
        """Return the URI of a checkpoint of this owner.

        Raises:
            NotFoundError: there is none, or it is another's.
        """
        uri = f"{SCHEME}{model_id}/{checkpoint_id}"
        row = self._journal.checkpoint(uri)
        if row is None or row["owner"] != owner:
            raise NotFoundError(f"there is no checkpoint {uri}")
        return uri

    def set_ttl(self, owner: str, model_id: str, checkpoint_id: str, seconds: Any) -> None:
        """Let a checkpoint's time to live end so many seconds from now; None: never.

        Raises:
            ConfigError: it is no time to live.
            NotFoundError: there is no such checkpoint.
        """
        checkpoints = self._models.checkpoints
        uri, expires = self.own(owner, model_id, checkpoint_id), expiry(seconds, checkpoints.clock())
        row, model = self._journal.checkpoint(uri) or {}, own_model(self._journal, owner, model_id)
        description = Description.of(model, row["number"], row["metadata"], row["created"], expires)
        with explained():
            description.write(checkpoints.locate(uri))
        self._journal.set_expiry(uri, expires)

    def weights_info(self, owner: str, uri: str) -> Json:
        """Return what a checkpoint was made with."""
        model_id, _, _ = self._models.checkpoints.parts(uri)
        row = own_model(self._journal, owner, model_id)
        folder = self._models.checkpoints.locate(uri)
        lora = self._models.base.saved_choice(LoraChoice.from_json(row["lora"]), folder)
        return {
            "base_model": self._models.base.name,
            "optimizer_config": {"type": "adamw"},
            "is_lora": True,
            "lora_rank": lora.rank,
            "train_unembed": lora.train_unembed,
            "train_mlp": lora.train_mlp,
            "train_attn": lora.train_attn,
        }

    def sessions(self, owner: str, query: Mapping[str, str]) -> Json:
        """Return the ids of an owner's sessions, a page at a time."""
        return self._listed("sessions", [row["id"] for row in self._journal.sessions(owner, *_page(query))])

    def session(self, owner: str, session: str) -> Json:
        """Return the models of one session."""
        row = own_session(self._journal, owner, session)
        runs = [model["id"] for model in self._journal.models_in(session)]
        metadata = json.loads(row["metadata"])
        about: Json = {"sampler_ids": [], "user_metadata": metadata or {}, "display_name": None}
        return self._listed("training_run_ids", runs) | about

    def info(self, owner: str, model_id: str) -> Json:
        """Return what ``get_info`` answers."""
        row, base = own_model(self._journal, owner, model_id), self._models.base
        names = {"arch": type(base.model).__name__, "model_name": base.name, "tokenizer_id": base.tokenizer_id}
        return {
            "type": "get_info",
            "model_id": model_id,
            "model_data": names,
            "optimizer_config": {"type": "adamw"},
            **_adapter(row),
            "model_name": base.name,
        }

    def _listed(self, what: str, rows: list[Any]) -> Json:
        caveat = self._journal.database.caveat
        return {what: rows} | ({"notice": caveat} if caveat else {})

    def _run(self, row: Json) -> Json:
        newest = {kind: self._journal.newest_checkpoint(row["id"], kind) for kind in _KINDS}
        shown = {kind: None if checkpoint is None else _checkpoint(checkpoint) for kind, checkpoint in newest.items()}
        return {
            "training_run_id": row["id"],
            "base_model": self._models.base.name,
            "model_owner": row["owner"] or "local",
            **_adapter(row),
            "corrupted": False,
            "last_request_time": _time(row["created"]),
            "last_checkpoint": shown["weights"],
            "last_sampler_checkpoint": shown["sampler_weights"],
            "user_metadata": json.loads(row["metadata"]),
        }


def _adapter(row: Json) -> Json:
    lora = LoraChoice.from_json(row["lora"])
    return {"is_lora": not lora.base_only, "lora_rank": None if lora.base_only else lora.rank}


def _checkpoint(row: Json) -> Json:
    _, kind, name = Checkpoints.parts(row["uri"])
    return {
        "checkpoint_id": f"{kind}/{name}",
        "checkpoint_type": _KINDS[kind],
        "time": _time(row["created"]),
        "tinker_path": row["uri"],
        "size_bytes": row["bytes"],
        "public": False,
        "user_metadata": json.loads(row["metadata"]),
        "expires_at": None if row["expires"] is None else _time(row["expires"]),
    }


def _page(query: Mapping[str, str]) -> tuple[int, int]:
    """Return limit and offset."""
    limit, offset = (int(query.get(key, default)) for key, default in (("limit", _PAGE), ("offset", 0)))
    return min(max(0, limit), _MOST), min(max(0, offset), 2**62)


def _cursor(query: Mapping[str, str], total: int) -> Json:
    cursor = {"offset": int(query.get("offset", 0)), "limit": int(query.get("limit", _PAGE)), "total_count": total}
    return {"cursor": cursor}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
