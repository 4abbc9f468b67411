"""What the protocol's numbered requests do to the models; each returns the answer as it goes on the wire."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, final

from ..backends import AdamParams, TorchBackend
from ..backends.arguments import as_loss
from ..backends.futures import FinishedFuture
from ..backends.native.memory import available_bytes
from ..backends.types import ForwardBackwardOutput
from ..datums.types import Datum, TensorData
from ..errors import ConfigError, PrecedingOperationFailed, ServiceError, UnsupportedError
from .creation import lora_choice
from .graphs import LossGraph
from .journal import Answer, Failure, Journal
from .leases import Leases, datum_keys
from .limits import Limits
from .names import LogicalNames
from .recovery import lost, recover
from .samplers import Samplers
from .sequencer import Sequencer, failure_of, require_number
from .tenants import LoraChoice, Tenants
from .unread import Unread
from .wire import GradientRequest, encode_output

__all__ = ["Operations"]

T = TypeVar("T")
Json = dict[str, Any]
_MODES: dict[str, Any] = {"none": None, "num_loss_tokens": "num_loss_tokens", "num_sequences": "num_sequences"}
_SHARE_OF_FREE = 0.25  # of free memory, for leases
Counter = Callable[[str, float], None]


@final
class Operations:
    """The service below its routes: models, gradients, steps, checkpoints.

    Args:
        tenants: the models.
        journal: what was promised; what an earlier process left unfinished is ended at once, as lost.
        sequencer: runs operations in order.
        limits: sizes and counts.
        count: is told what to add to which counter.
    """

    def __init__(
        self, tenants: Tenants, journal: Journal, sequencer: Sequencer, limits: Limits, count: Counter
    ) -> None:
        self.tenants, self.journal, self.sequencer, self.limits = tenants, journal, sequencer, limits
        free = available_bytes(next(tenants.base.model.parameters()).device)
        budget = _SHARE_OF_FREE * free if limits.lease_bytes is None else limits.lease_bytes
        self.leases = Leases(budget, limits.lease_seconds)
        self.samplers = Samplers(tenants, journal, sequencer, limits)
        self.names = LogicalNames(journal)
        self._count = count
        self._losses: dict[str, LossGraph] = {}
        self._unread = Unread()
        self._seen: dict[str, float] = {}
        recover(tenants.checkpoints, journal)

    def own(self, owner: str, model_id: str) -> None:
        """Check that a model is this owner's, and that it is known whether it lives.

        Raises:
            ServiceError: there is none, or it is another's (which is the same).
        """
        row = self.journal.model(model_id)
        if row is None or row["owner"] != owner:
            raise ServiceError(f"there is no model {model_id!r} on this server")
        self._seen[row["session"]] = time.monotonic()
        if not self.sequencer.knows(model_id):
            self.sequencer.end(model_id, lost(self.journal, model_id))

    def require_session(self, owner: str, session: Any) -> str:
        """Return a session's id.

        Raises:
            ServiceError: there is none, or it is another's.
        """
        if not isinstance(session, str) or self.journal.session_owner(session) != owner:
            raise ServiceError(f"there is no session {session!r} on this server")
        self._seen[session] = time.monotonic()
        return session

    def make_room(self) -> None:
        """Let go of the models of silent sessions if there is no room for a new one.

        Raises:
            ServiceError: all are in use.
        """
        if len(self.tenants.backends) < self.limits.models:
            return
        long_ago = time.monotonic() - self.limits.idle_seconds
        for session in {model_id.split(":")[0] for model_id in self.tenants.backends}:
            if self._seen.get(session, 0.0) < long_ago:
                self.finish(session, f"was silent for {self.limits.idle_seconds:g} s and made room for another")
        if len(self.tenants.backends) >= self.limits.models:
            raise ServiceError(
                f"this server holds {self.limits.models} models, and all are in use; close one, or try later"
            )

    def create_model(self, owner: str, raw: bytes, body: Json) -> str:
        """Make a model with a fresh adapter, or (with ``path``) from a checkpoint; return the request id."""
        session, number = self.require_session(owner, body["session_id"]), _number(body, "model_seq_id")
        model_id = f"{session}:train:{number}"
        line = f"{session}:models"
        self.sequencer.open(line)

        def work() -> Json:
            self.make_room()
            if "path" not in body:
                lora = lora_choice(body, self.tenants.base.name, self.limits.rank)
                self._create(model_id, session, owner, lora, body)
                return {"model_id": model_id, "type": "create_model"}
            source, _, _ = self.tenants.checkpoints.parts(body["path"])
            lora = self.lora_of(owner, source)
            self.tenants.checkpoints.locate(body["path"])
            self._create(model_id, session, owner, lora, body)
            try:
                self.tenants.load(model_id, body["path"], bool(body.get("optimizer", False)))
            except Exception:
                self.tenants.release(model_id)
                raise
            return {"path": body["path"], "model_id": model_id, "type": "load_weights"}

        request = self.sequencer.submit(owner, line, number, raw, "create_model", work, ordered=False)
        self.sequencer.open(model_id)
        return request

    def lora_of(self, owner: str, model_id: str) -> LoraChoice:
        """Return a model's adapter choice, also after a restart.

        Raises:
            ServiceError: there is no such model, or it is another's.
        """
        row = self.journal.model(model_id)
        if row is None or row["owner"] != owner:
            raise ServiceError(f"there is no model {model_id!r} on this server")
        return LoraChoice.from_json(row["lora"])

    def release(self, model_id: str) -> None:
        """Let go of a model."""
        self.tenants.release(model_id)
        self.leases.forget(model_id)
        self._unread.forget(model_id)

    def finish(self, session: str, why: str = "was finished by its client") -> None:
        """Let go of all models of a session that has ended; what is asked of them later fails."""
        for model_id in [m for m in self.tenants.backends if m.startswith(f"{session}:")]:
            self.release(model_id)
            last = self.journal.last_checkpoint(model_id)
            self.sequencer.end(model_id, f"the session of {model_id} {why}; its last checkpoint: {last or 'none'}")
        self._seen.pop(session, None)
        self._losses = {k: v for k, v in self._losses.items() if not k.startswith(f"{session}:")}

    def unload(self, owner: str, raw: bytes, body: Json) -> str:
        """Let go of a model when all before it has run."""
        model_id = body["model_id"]
        self.own(owner, model_id)

        def work() -> Json:
            self.release(model_id)
            self.sequencer.end(model_id, f"{model_id} was unloaded by its client")
            return {"type": "unload_model", "model_id": model_id}

        number = body.get("seq_id")
        if number is None:
            return self.sequencer.submit(owner, model_id, None, raw, "unload_model", work, ordered=False)
        return self.sequencer.submit(owner, model_id, _number(body, "seq_id"), raw, "unload_model", work)

    def gradient(self, owner: str, request: GradientRequest) -> str:
        """``forward_backward``, or ``forward`` where the request says so."""
        model_id = request.model_id
        self.own(owner, model_id)
        require_number("seq_id", request.seq_id)

        def work() -> Answer:
            backend = self.tenants.backend(model_id, scores_only=request.forward_only)
            data = request.data()
            self.limits.check_data(data)
            kind = "forward" if request.forward_only else "forward_backward"
            self._count(f"{kind}_tokens", sum(len(datum.model_input) for datum in data))
            if request.forward_only:
                return self._forward(backend, model_id, data, request)
            if request.loss_fn == "custom":
                graph = self._loss(owner, model_id, request.config)
                return _settled(backend.forward_backward_custom(data, graph), _output)
            return self._backward(backend, model_id, data, request)

        kind = "forward" if request.forward_only else "forward_backward"
        again = self.journal.numbered(model_id, request.seq_id) is not None
        accepted = self.sequencer.submit(owner, model_id, request.seq_id, request.payload, kind, work)
        if not request.forward_only and not again:
            self._unread.accepted(model_id, accepted, request.seq_id)
        return accepted

    def delivered(self, request: str) -> None:
        """Note that a client has the result of a request."""
        self._unread.read(request)

    def create_loss(self, owner: str, raw: bytes, body: Json) -> str:
        """Take a traced loss over as data; it runs by an interpreter over an allow-list."""
        session, number = self.require_session(owner, body["session_id"]), _number(body, "custom_loss_seq_id")
        line = f"{session}:losses"
        self.sequencer.open(line)

        def work() -> Json:
            loss_id = f"{session}:loss:{number}"
            self._losses[loss_id] = LossGraph.of(body)
            return {"loss_id": loss_id, "type": "create_custom_loss"}

        return self.sequencer.submit(owner, line, number, raw, "create_custom_loss", work, ordered=False)

    def optim_step(self, owner: str, raw: bytes, body: Json) -> str:
        """One AdamW step, normalised if the request says so.

        A step that was sent before the client had the failure of a gradient is refused: it would be a step without it.
        """
        model_id = body["model_id"]
        self.own(owner, model_id)
        number, sent = _number(body, "seq_id"), self._unread.now

        def work() -> Answer:
            for request in self._unread.behind(model_id, number, sent):
                found = self.sequencer.result(owner, request).result()
                if isinstance(found, Failure):
                    raise PrecedingOperationFailed(
                        f"an earlier gradient operation failed ({found.text}) and this step was sent before that was known; "
                        "the window holds the other gradients: step again, or go on without them"
                    )
            self._unread.stepped(model_id, number)
            future = self.tenants.backend(model_id).optim_step(*_step_of(body))
            self.leases.drop(model_id)
            return _settled(future, lambda output: {"metrics": finite(output.metrics)})

        return self.sequencer.submit(owner, model_id, number, raw, "optim_step", work)

    def save_weights(self, owner: str, raw: bytes, body: Json) -> str:
        """A checkpoint with everything."""
        model_id, number = body["model_id"], _number(body, "seq_id")
        self.own(owner, model_id)

        def work() -> Json:
            return {"path": self._save(owner, model_id, "weights", number, body), "type": "save_weights"}

        return self.sequencer.submit(owner, model_id, number, raw, "save_weights", work)

    def load_weights(self, owner: str, raw: bytes, body: Json) -> str:
        """Load into a model that exists, or make one from a checkpoint."""
        if "model_id" not in body:
            return self.create_model(owner, raw, body)
        model_id = body["model_id"]
        self.own(owner, model_id)

        def work() -> Json:
            uri = self.names.resolve(owner, model_id, body["path"])
            self.lora_of(owner, self.tenants.checkpoints.parts(uri)[0])
            self.tenants.load(model_id, uri, bool(body.get("optimizer", False)))
            self.leases.drop(model_id)
            return {"path": body["path"], "model_id": model_id, "type": "load_weights"}

        return self.sequencer.submit(owner, model_id, _number(body, "seq_id"), raw, "load_weights", work)

    def load_adapter(self, owner: str, raw: bytes, body: Json) -> str:
        """Fail in turn: a number that was not accepted would be waited for by all that come after it."""
        model_id = body["model_id"]
        self.own(owner, model_id)

        def work() -> Json:
            raise UnsupportedError("load_adapter: this server loads its own checkpoints only, by load_state")

        return self.sequencer.submit(owner, model_id, _number(body, "seq_id"), raw, "load_adapter", work)

    def save_for_sampler(self, owner: str, raw: bytes, body: Json) -> str:
        """Freeze the present weights: on the disk under a name, or in memory for one sampling session."""
        model_id, number = body["model_id"], _number(body, "seq_id")
        self.own(owner, model_id)

        def work() -> Json:
            if body.get("path") is not None:
                uri = self._save(owner, model_id, "sampler_weights", number, body)
                return {"path": uri, "type": "save_weights_for_sampler"}
            session = f"{model_id.split(':')[0]}:sample:{_number(body, 'sampling_session_seq_id')}"
            self.samplers.add(session, owner, self.tenants.sampler(model_id))
            return {"sampling_session_id": session, "type": "save_weights_for_sampler"}

        return self.sequencer.submit(owner, model_id, number, raw, "save_weights_for_sampler", work)

    def _create(self, model_id: str, session: str, owner: str, lora: LoraChoice, body: Json) -> None:
        self.tenants.create(model_id, lora)
        self.journal.add_model(model_id, session, owner, lora.to_json(), body.get("user_metadata"), body.get("path"))

    def _save(self, owner: str, model_id: str, kind: str, number: int, body: Json) -> str:
        """Write a checkpoint; the journal knows of it before and after, so that a kill between leaves no doubt."""
        checkpoints, metadata = self.tenants.checkpoints, body.get("user_metadata")
        uri = checkpoints.uri(model_id, kind, body["path"])
        self.journal.begin_save(uri, model_id, number, checkpoints.fingerprint(uri), metadata)
        self.tenants.save(model_id, kind, body["path"], bool(body.get("overwrite", False)))
        self.journal.add_checkpoint(uri, model_id, owner, number, checkpoints.size(uri), metadata)
        return uri

    def _loss(self, owner: str, model_id: str, config: Mapping[str, Any]) -> LossGraph:
        loss_id = str(config.get("loss_id"))
        if loss_id not in self._losses or loss_id.split(":")[0] != model_id.split(":")[0]:
            raise ServiceError(f"there is no custom loss {loss_id!r} in this session; create it again")
        return self._losses[loss_id]

    def _forward(self, backend: TorchBackend, model_id: str, data: list[Datum], request: GradientRequest) -> Answer:
        room = self.leases.room
        if not self._may_be_custom(model_id, data, request) or room <= 0 or not self.leases.worth(model_id):
            return _settled(backend.forward(data, request.loss_fn, request.config), _output)
        # The forward of a custom loss: everything is checked as for the plain one, then its graphs are kept.
        held = backend.hold(data, budget=room).result()
        self.leases.keep(model_id, datum_keys(data), held)
        outputs = [{"logprobs": TensorData(x)} for x in held.logprobs]
        metrics = as_loss("cross_entropy", None)(data, held.logprobs)[1]
        return _output(ForwardBackwardOutput(outputs, {**metrics, "held_tokens:sum": float(held.tokens)}))

    def _may_be_custom(self, model_id: str, data: list[Datum], request: GradientRequest) -> bool:
        plain = request.loss_fn == "cross_entropy" and not request.config
        whole = all("target_tokens" in datum.loss_fn_inputs for datum in data)
        return request.custom and plain and whole and not self.tenants.choices[model_id].base_only

    def _backward(self, backend: TorchBackend, model_id: str, data: list[Datum], request: GradientRequest) -> Answer:
        held = self.leases.take(model_id, datum_keys(data)) if request.custom else {}
        if held and not request.config:
            self._count("lease_tokens_reused", sum(one.tokens for one in held))
            return _settled(backend.pull(held, data, request.loss_fn), _output)
        if request.custom:
            self._count("lease_tokens_recomputed", sum(len(datum.model_input) for datum in data))
        return _settled(backend.forward_backward(data, request.loss_fn, request.config), _output)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out metrics that JSON cannot hold: a client would ask again for ever."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def _step_of(body: Json) -> tuple[AdamParams, Any]:
    """Return parameters and normalisation of a step; the latter has a place of its own (Fireworks' client), or lies among
    the parameters of an optimizer that is named (the tinker SDK's form for what it does not know)."""
    given = {k: v for k, v in (body.get("adam_params") or body["optimizer_params"]).items() if v is not None}
    given.pop("emit_grad_norm_metrics", None)
    if given.pop("type", "adamw") != "adamw":
        raise ConfigError(f"this server's optimizer is adamw, got {body['optimizer_params']['type']!r}")
    mode = body.get("grad_accumulation_normalization") or given.pop("grad_accumulation_normalization", None) or "none"
    if mode not in _MODES:
        raise ConfigError(f"grad_accumulation_normalization must be one of {sorted(_MODES)}, got {mode!r}")
    unknown = sorted(set(given) - {field.name for field in fields(AdamParams)})
    if unknown:
        raise ConfigError(f"the optimizer's parameters have keys that this server does not know: {unknown}")
    return AdamParams(**given), _MODES[mode]


def _number(body: Json, key: str) -> int:
    return require_number(key, body[key])


def _settled(future: FinishedFuture[T], encode: Callable[[T], Answer]) -> Answer:
    """Return the answer of a finished operation, or its failure; a step knows of it by `Operations.optim_step`."""
    error = future.exception()
    return encode(future.result()) if error is None else failure_of(error)


def _output(output: ForwardBackwardOutput) -> bytes:
    outputs = [dict(one) for one in output.loss_fn_outputs]
    if any("scored" in one for one in outputs):
        for one in outputs:
            ones = one["logprobs"].to_torch().new_ones(one["logprobs"].shape[:1])
            one.setdefault("scored", TensorData(ones))
    return encode_output(outputs, output.metrics)
