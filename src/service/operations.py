"""Models and their checkpoints: what the protocol's numbered requests do; each returns the id of its answer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, final

from ..backends.native.models.lora import LoraChoice
from ..errors import ServiceError, UnsupportedError
from .durability.descriptions import expiry
from .durability.journal import Journal
from .durability.recovery import recover
from .limits import Limits
from .queueing.requirements import number_of, optional_number_of
from .queueing.sequencer import Sequencer
from .quotas import Quota
from .sampling.samplers import Samplers
from .served.create import given_settings, lora_choice
from .served.encryption import recipients_of
from .served.logical_names import LogicalNames
from .served.registry import ServedModels
from .served.sessions import Sessions
from .stored.saving import Save, save
from .training.training import Training

__all__ = ["Operations"]

Json = dict[str, Any]
Count = Callable[[str, float], None]


@final
class Operations:
    """The service below its routes: models, gradients, steps, checkpoints.

    Args:
        models: the models that are served.
        journal: what was promised; what an earlier process left unfinished is ended at once, as lost.
        sequencer: runs operations in order.
        limits: sizes and counts.
        count: is told what to add to which counter.

    Attributes:
        sessions, training, samplers, names: the parts that have a theme of their own.
    """

    def __init__(
        self, models: ServedModels, journal: Journal, sequencer: Sequencer, limits: Limits, count: Count
    ) -> None:
        self.models, self.journal, self.sequencer, self.limits = models, journal, sequencer, limits
        self.sessions = Sessions(journal, sequencer)
        self.training = Training(models, sequencer, self.sessions, limits, count)
        self.samplers = Samplers(models, journal, sequencer, limits)
        self.names = LogicalNames(journal)
        frees = "unload one, finish its session, or try later"
        self._quota = Quota("models", limits.models, limits.models_per_key, limits.shared, frees)
        recover(models.checkpoints, journal)

    def make_room(self, owner: str) -> None:
        """Let go of the models of silent sessions while there is no room for a new one of this owner: first of its own.

        Raises:
            ServiceError: all are in use, or the owner has as many as it may.
        """
        sessions = {(row["owner"] != owner, row["session"]) for row in self._living()}
        for others, session in sorted(sessions):
            own, used = self._held(owner)
            if self._quota.refusal(own, used) is None or (others and self._quota.refusal(own, 0)):
                break  # what others let go of does not help an owner that has all it may
            if self.sessions.silent(session, self.limits.idle_seconds):
                self._let_go(session, f"was silent for {self.limits.idle_seconds:g} s and made room for another")
        refusal = self._quota.refusal(*self._held(owner))
        if refusal is not None:
            raise ServiceError(refusal)

    def _living(self) -> list[Json]:
        rows = (self.journal.model(model_id) for model_id in self.models.backends)
        return [row for row in rows if row is not None]

    def _held(self, owner: str) -> tuple[int, int]:
        owners = Counter(row["owner"] for row in self._living())
        return owners[owner], owners.total()

    def create_model(self, owner: str, raw: bytes, body: Json) -> str:
        """Make a model with a fresh adapter, or (with ``path``) from a checkpoint; return the request id."""
        session, number = self.sessions.require(owner, body["session_id"]), number_of(body, "model_seq_id")
        model_id = f"{session}:train:{number}"

        def work() -> Json:
            if self.journal.model(model_id) is not None:
                raise ServiceError(f"{model_id!r} holds a copy of a checkpoint already; give another model_seq_id")
            self.make_room(owner)
            if "path" in body:
                return self._create_from_checkpoint(model_id, session, owner, body)
            lora = lora_choice(body, self.models.base.name, self.limits.rank)
            self._create(model_id, session, owner, lora, body)
            return {"model_id": model_id, "type": "create_model"}

        return self.sequencer.submit(owner, f"{session}:models", number, raw, "create_model", work, ordered=False)

    def in_memory(self) -> list[str]:
        """Return the ids of the models and sampling sessions in memory."""
        return [*self.models.backends, *self.samplers.names()]

    def release(self, model_id: str) -> None:
        """Let go of a model."""
        self.models.release(model_id)
        self.training.forget_model(model_id)

    def finish(self, session: str) -> None:
        """Let go of all that a finished session holds; what waits and what is asked of it later fails."""
        why = "was finished by its client"
        self._let_go(session, why)
        self.journal.end_session(session)
        self.sequencer.end_session(session, f"the session {session} {why}; create another one")
        self.sessions.forget(session)

    def _let_go(self, session: str, why: str) -> None:
        for model_id in [m for m in self.models.backends if m.startswith(f"{session}:")]:
            self.release(model_id)
            last = self.journal.last_checkpoint(model_id)
            self.sequencer.end(model_id, f"the session of {model_id} {why}; its last checkpoint: {last or 'none'}")
        self.training.forget_session(session)
        self.samplers.forget(session)

    def sweep(self) -> None:
        """Let go of graphs and samplers whose time has passed, and of what silent sessions hold beside models and samplers."""
        self.training.graphs.sweep()
        self.samplers.sweep()
        for session in self.sessions.silent_ones(self.limits.idle_seconds):
            self.training.forget_session(session)

    def unload(self, owner: str, raw: bytes, body: Json) -> str:
        """Let go of a model when all before it has run."""
        model_id = body["model_id"]
        self.sessions.require_model(owner, model_id)

        def work() -> Json:
            self.release(model_id)
            self.sequencer.end(model_id, f"{model_id} was unloaded by its client")
            return {"type": "unload_model", "model_id": model_id}

        return self.sequencer.submit(owner, model_id, optional_number_of(body, "seq_id"), raw, "unload_model", work)

    def save_weights(self, owner: str, raw: bytes, body: Json) -> str:
        """A checkpoint with everything."""
        model_id, number = body["model_id"], number_of(body, "seq_id")
        self.sessions.require_model(owner, model_id)

        def work() -> Json:
            return {"path": self._save(owner, model_id, "weights", number, body), "type": "save_weights"}

        return self.sequencer.submit(owner, model_id, number, raw, "save_weights", work)

    def save_external(self, owner: str, raw: bytes, body: Json) -> str:
        """An adapter alone, in PEFT's format, for download."""
        model_id, number = body["model_id"], number_of(body, "seq_id")
        self.sessions.require_model(owner, model_id)

        def work() -> Json:
            readers = recipients_of(body.get("age_encryption_recipients"))
            uri = self._save(owner, model_id, "external_weights", number, body, readers)
            return {"path": uri, "size_bytes": self.models.checkpoints.size(uri), "type": "save_weights_external"}

        return self.sequencer.submit(owner, model_id, number, raw, "save_weights_external", work)

    def load_weights(self, owner: str, raw: bytes, body: Json) -> str:
        """Load into a model that exists, or make one from a checkpoint."""
        if "model_id" not in body:
            return self.create_model(owner, raw, body)
        model_id = body["model_id"]
        self.sessions.require_model(owner, model_id)

        def work() -> Json:
            uri = self.names.resolve(owner, model_id, body["path"])
            self.sessions.lora_of(owner, self.models.checkpoints.parts(uri)[0])

            def record(choice: LoraChoice) -> None:
                self.journal.set_lora(model_id, choice.to_json())

            self.models.load(model_id, uri, bool(body.get("optimizer", False)), record)
            self.training.graphs.drop(model_id)
            return {"path": body["path"], "model_id": model_id, "type": "load_weights"}

        return self.sequencer.submit(owner, model_id, number_of(body, "seq_id"), raw, "load_weights", work)

    def load_adapter(self, owner: str, raw: bytes, body: Json) -> str:
        """Fail in turn: a number that was not accepted would be waited for by all that come after it."""
        model_id = body["model_id"]
        self.sessions.require_model(owner, model_id)

        def work() -> Json:
            raise UnsupportedError("load_adapter: this server loads its own checkpoints only, by load_state")

        return self.sequencer.submit(owner, model_id, number_of(body, "seq_id"), raw, "load_adapter", work)

    def save_for_sampler(self, owner: str, raw: bytes, body: Json) -> str:
        """Freeze the present weights: on the disk under a name, or in memory for one sampling session."""
        model_id, number = body["model_id"], number_of(body, "seq_id")
        self.sessions.require_model(owner, model_id)

        def work() -> Json:
            if body.get("path") is not None:
                uri = self._save(owner, model_id, "sampler_weights", number, body)
                return {"path": uri, "type": "save_weights_for_sampler"}
            session = f"{model_id.split(':')[0]}:sample:{number_of(body, 'sampling_session_seq_id')}"
            expires = expiry(body.get("ttl_seconds"), self.models.checkpoints.clock())
            self.samplers.add(session, owner, self.models.sampler(model_id), expires)
            return {"sampling_session_id": session, "type": "save_weights_for_sampler"}

        # The SDK numbers the session anew each time it asks again, so that number is no part of what must be the same.
        same = json.dumps({**body, "sampling_session_seq_id": None}, sort_keys=True).encode()
        return self.sequencer.submit(owner, model_id, number, same, "save_weights_for_sampler", work)

    def _create(self, model_id: str, session: str, owner: str, lora: LoraChoice, body: Json) -> None:
        self.models.create(model_id, lora, given_settings(body))
        row = (model_id, session, owner, lora.to_json(), body.get("user_metadata"), body.get("path"))
        try:
            self.journal.add_model(*row)
        except Exception:  # metadata that are no JSON, or a full disk: no quota would count the model
            self.release(model_id)
            raise
        self.sequencer.open(model_id)

    def _create_from_checkpoint(self, model_id: str, session: str, owner: str, body: Json) -> Json:
        source, _, _ = self.models.checkpoints.parts(body["path"])
        lora = self.sessions.lora_of(owner, source)
        lora = self.models.base.saved_choice(lora, self.models.checkpoints.loadable(body["path"]))
        self._create(model_id, session, owner, lora, body)
        try:
            self.models.load(model_id, body["path"], bool(body.get("optimizer", False)))
        except Exception:
            self.release(model_id)
            self.sequencer.end(model_id, f"{model_id} could not be created; read the error of its creation")
            raise
        return {"path": body["path"], "model_id": model_id, "type": "load_weights"}

    def _save(self, owner: str, model_id: str, kind: str, number: int, body: Json, readers: Sequence[Any] = ()) -> str:
        overwrite, metadata = bool(body.get("overwrite", False)), body.get("user_metadata")
        asked = Save(owner, model_id, kind, number, body["path"], overwrite, metadata, body.get("ttl_seconds"), readers)
        return save(self.models, self.journal, asked, self.require_space)

    def require_space(self, owner: str, size: int) -> None:
        """Check that an owner may have so many bytes of checkpoints more.

        Raises:
            ServiceError: it may not.
        """
        used, free = self.journal.stored_bytes(), shutil.disk_usage(self.models.checkpoints.root).free
        frees = "delete those that are no longer needed"
        quota = Quota("bytes of checkpoints", used + free, self.limits.disk_per_key, self.limits.shared, frees)
        refusal = quota.refusal(self.journal.stored_bytes(owner), used, size)
        if refusal is not None:
            raise ServiceError(refusal)
