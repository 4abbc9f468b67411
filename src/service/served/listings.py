"""What a client may ask about: training runs, checkpoints, sessions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, final

from ...backends.native.models.lora import LoraChoice
from ...errors import NotFoundError
from ..durability.checkpoints import Checkpoints
from ..durability.journal import Journal
from .registry import ServedModels

__all__ = ["Listings"]

Json = dict[str, Any]
_TYPES: Final = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


@final
class Listings:
    """Answers from the journal, of one owner at a time."""

    def __init__(self, models: ServedModels, journal: Journal) -> None:
        self._models, self._journal = models, journal

    def runs(self, owner: str, query: Mapping[str, str]) -> Json:
        """Models, alive or not."""
        rows = [self._run(row) for row in self._journal.models(owner)]
        return {"training_runs": _page(rows, query), "cursor": _cursor(rows, query)}

    def run(self, owner: str, model_id: str) -> Json:
        """One model."""
        return self._run(self._model(owner, model_id))

    def checkpoints(self, owner: str, query: Mapping[str, str], model_id: str | None = None) -> Json:
        """Checkpoints of one model, or of all."""
        if model_id is not None:
            self._model(owner, model_id)
        rows = [_checkpoint(row) for row in self._journal.checkpoints(owner, model_id)]
        return {"checkpoints": _page(rows, query), "cursor": _cursor(rows, query)}

    def delete(self, owner: str, model_id: str, checkpoint_id: str) -> None:
        """Remove a checkpoint from the disk."""
        uri = self.own(owner, model_id, checkpoint_id)
        self._models.checkpoints.delete(uri)
        self._journal.drop_checkpoint(uri)

    def own(self, owner: str, model_id: str, checkpoint_id: str) -> str:
        """Return the URI of a checkpoint of this owner.

        Raises:
            NotFoundError: there is none, or it is another's.
        """
        uri = f"tinker://{model_id}/{checkpoint_id}"
        if uri not in [row["uri"] for row in self._journal.checkpoints(owner, model_id)]:
            raise NotFoundError(f"there is no checkpoint {uri}")
        return uri

    def weights_info(self, owner: str, uri: str) -> Json:
        """What a checkpoint was made with."""
        model_id, _, _ = self._models.checkpoints.parts(uri)
        row = self._model(owner, model_id)
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
        """Session ids."""
        return {"sessions": _page([row["id"] for row in self._journal.sessions(owner)], query)}

    def session(self, owner: str, session: str) -> Json:
        """One session's models."""
        rows = [row for row in self._journal.sessions(owner) if row["id"] == session]
        if not rows:
            raise NotFoundError(f"there is no session {session!r} on this server")
        runs = [row["id"] for row in self._journal.models(owner) if row["session"] == session]
        metadata = json.loads(rows[0]["metadata"])
        return {"training_run_ids": runs, "sampler_ids": [], "user_metadata": metadata or {}, "display_name": None}

    def info(self, owner: str, model_id: str) -> Json:
        """``get_info``."""
        row, base = self._model(owner, model_id), self._models.base
        names = {"arch": type(base.model).__name__, "model_name": base.name, "tokenizer_id": base.tokenizer_id}
        return {
            "type": "get_info",
            "model_id": model_id,
            "model_data": names,
            "optimizer_config": {"type": "adamw"},
            **_adapter(row),
            "model_name": base.name,
        }

    def _model(self, owner: str, model_id: Any) -> Json:
        row = self._journal.model(model_id) if isinstance(model_id, str) else None
        if row is None or row["owner"] != owner:
            raise NotFoundError(f"there is no model {model_id!r} on this server")
        return row

    def _run(self, row: Json) -> Json:
        checkpoints = [_checkpoint(checkpoint) for checkpoint in self._journal.checkpoints(row["owner"], row["id"])]
        by_kind = {
            kind: next((c for c in checkpoints if c["checkpoint_type"] == kind), None)
            for kind in ("training", "sampler")
        }
        return {
            "training_run_id": row["id"],
            "base_model": self._models.base.name,
            "model_owner": row["owner"] or "local",
            **_adapter(row),
            "corrupted": False,
            "last_request_time": _time(row["created"]),
            "last_checkpoint": by_kind["training"],
            "last_sampler_checkpoint": by_kind["sampler"],
            "user_metadata": json.loads(row["metadata"]),
        }


def _adapter(row: Json) -> Json:
    lora = LoraChoice.from_json(row["lora"])
    return {"is_lora": not lora.base_only, "lora_rank": None if lora.base_only else lora.rank}


def _checkpoint(row: Json) -> Json:
    _, kind, name = Checkpoints.parts(row["uri"])
    return {
        "checkpoint_id": f"{kind}/{name}",
        "checkpoint_type": _TYPES[kind],
        "time": _time(row["created"]),
        "tinker_path": row["uri"],
        "size_bytes": row["bytes"],
        "public": False,
        "user_metadata": json.loads(row["metadata"]),
        "expires_at": None,
    }


def _page(rows: Sequence[Any], query: Mapping[str, str]) -> list[Any]:
    offset, limit = max(0, int(query.get("offset", 0))), max(0, int(query.get("limit", 20)))
    return list(rows[offset : offset + limit])


def _cursor(rows: Sequence[Any], query: Mapping[str, str]) -> Json:
    return {"offset": int(query.get("offset", 0)), "limit": int(query.get("limit", 20)), "total_count": len(rows)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
