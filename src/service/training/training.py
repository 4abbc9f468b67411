"""Gradients, custom losses and optimizer steps of the models that are served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar, final

from ...backends import AdamParams, TorchBackend
from ...backends.calls.losses import as_loss
from ...backends.operations.futures import Future
from ...backends.types import ForwardBackwardOutput
from ...datums.types import Datum, TensorData
from ...errors import ConfigError, NotFoundError, PrecedingOperationFailed, ServiceError
from ..custom_loss.interpreter import LossGraph
from ..durability.answers import Answer, Failure
from ..limits import Limits
from ..queueing.acknowledgements import Acknowledgements, FailedGradient
from ..queueing.requirements import failure_of, number_of, require_number
from ..queueing.sequencer import Sequencer
from ..quotas import Quota
from ..served.registry import ServedModels
from ..served.sessions import Sessions
from ..wire.json_form import finite_metrics
from ..wire.protobuf import GradientRequest, encode_output
from .graph_cache import GraphCache, datum_keys
from .provenance import with_provenance

__all__ = ["Training"]

T = TypeVar("T")
Json = dict[str, Any]
_MODES: dict[str, Any] = {"none": None, "num_loss_tokens": "num_loss_tokens", "num_sequences": "num_sequences"}


@final
class Training:
    """What changes the weights of a model, in the order of its numbers.

    Args:
        models: the models that are served.
        sequencer: runs operations in order.
        sessions: whose is what.
        limits: sizes and counts.
        count: is told what to add to which counter.
    """

    def __init__(
        self,
        models: ServedModels,
        sequencer: Sequencer,
        sessions: Sessions,
        limits: Limits,
        count: Callable[[str, float], None],
    ) -> None:
        self._models, self._sequencer = models, sequencer
        self._sessions, self._limits, self._count = sessions, limits, count
        device = next(models.base.model.parameters()).device
        self.graphs = GraphCache(limits.graph_bytes, limits.graph_seconds, device)
        self._losses: dict[str, tuple[str, LossGraph]] = {}  # whose they are
        self._quota = Quota(
            "custom losses",
            limits.losses,
            limits.losses_per_key,
            limits.shared,
            "those of a session go when it is finished",
        )
        self._acknowledgements = Acknowledgements()

    def gradient(self, owner: str, request: GradientRequest) -> str:
        """Accept ``forward_backward``, or ``forward`` where the request says so; return the request id."""
        model_id = request.model_id
        self._sessions.require_model(owner, model_id)
        require_number("seq_id", request.seq_id)
        kind = "forward" if request.forward_only else "forward_backward"
        payload, request = request.payload, replace(request, payload=b"")  # it would be kept until the datums' turn

        def work() -> Answer:
            backend = self._models.backend(model_id, scores_only=request.forward_only)
            data = request.data()
            self._limits.check_data(data, self._models.base.context)
            data = with_provenance(request, data)
            self._count(f"{kind}_tokens", sum(len(datum.model_input) for datum in data))
            if request.forward_only:
                return self._forward(backend, model_id, data, request)
            if request.loss_fn == "custom":
                graph = self._loss(model_id, request.config)
                return _settled(backend.forward_backward_custom(data, graph), _output)
            return self._backward(backend, model_id, data, request)

        def answered(accepted: str, answer: Answer) -> None:
            if isinstance(answer, Failure) and not request.forward_only and model_id in self._models.backends:
                self._acknowledgements.failed(model_id, accepted, request.seq_id, answer.text)

        return self._sequencer.submit(owner, model_id, request.seq_id, payload, kind, work, answered=answered)

    def delivered(self, request: str) -> None:
        """Note that a client has the result of a request."""
        self._acknowledgements.acknowledge(request)

    def create_loss(self, owner: str, raw: bytes, body: Json) -> str:
        """Accept a traced loss as data, for an interpreter with an allow-list; return the request id."""
        session, number = self._sessions.require(owner, body["session_id"]), number_of(body, "custom_loss_seq_id")

        def work() -> Json:
            own = sum(whose == owner for whose, _ in self._losses.values())
            refusal = self._quota.refusal(own, len(self._losses))
            if refusal is not None:
                raise ServiceError(refusal)
            loss_id = f"{session}:loss:{number}"
            self._losses[loss_id] = (owner, LossGraph.of(body))
            return {"loss_id": loss_id, "type": "create_custom_loss"}

        queue = f"{session}:losses"
        return self._sequencer.submit(owner, queue, number, raw, "create_custom_loss", work, ordered=False)

    def optim_step(self, owner: str, raw: bytes, body: Json) -> str:
        """Accept one AdamW step, normalised if the request says so; return the request id.

        A step that was sent before its client had read of a failed gradient is refused: it would be a step without it. The
        refusal tells of the failure; whoever has read it, and steps, does so knowingly.
        """
        model_id = body["model_id"]
        self._sessions.require_model(owner, model_id)
        number, sent = number_of(body, "seq_id"), self._acknowledgements.now
        refused = False

        def work() -> Answer:
            nonlocal refused
            failures = self._acknowledgements.unacknowledged(model_id, number, sent)
            if failures:
                refused = True
                raise PrecedingOperationFailed(_refusal(failures))
            future = self._models.backend(model_id).optim_step(*_step_of(body))
            self.graphs.drop(model_id)
            if future.exception() is None:
                self._acknowledgements.stepped(model_id, number)
            return _settled(future, lambda output: {"metrics": finite_metrics(output.metrics)})

        def answered(request: str, answer: Answer) -> None:
            if refused:
                self._acknowledgements.refused(model_id, request, number)

        return self._sequencer.submit(owner, model_id, number, raw, "optim_step", work, answered=answered)

    def forget_model(self, model_id: str) -> None:
        """Drop what is kept for a model that has gone."""
        self.graphs.forget(model_id)
        self._acknowledgements.forget(model_id)

    def forget_session(self, session: str) -> None:
        """Drop the losses of a session that has ended."""
        self._losses = {k: v for k, v in self._losses.items() if not k.startswith(f"{session}:")}

    def _loss(self, model_id: str, config: Mapping[str, Any]) -> LossGraph:
        loss_id = str(config.get("loss_id"))
        if loss_id not in self._losses or loss_id.split(":")[0] != model_id.split(":")[0]:
            raise NotFoundError(f"there is no custom loss {loss_id!r} in this session; create it again")
        return self._losses[loss_id][1]

    def _forward(self, backend: TorchBackend, model_id: str, data: list[Datum], request: GradientRequest) -> Answer:
        budget = self.graphs.budget if self._may_be_custom(model_id, data, request) else 0.0
        if budget <= 0 or not self.graphs.is_worthwhile(model_id):
            return _settled(backend.forward(data, request.loss_fn, request.config), _output)
        # The forward of a custom loss: everything is checked as for the plain one, then its graphs are cached.
        retained = backend.forward_retain(data, budget=budget).result()
        self.graphs.add(model_id, datum_keys(data), retained)
        metrics = as_loss("cross_entropy", None)(data, retained.logprobs)[1]
        return _output(
            ForwardBackwardOutput.of(retained.logprobs, {**metrics, "retained_tokens:sum": float(retained.tokens)})
        )

    def _may_be_custom(self, model_id: str, data: list[Datum], request: GradientRequest) -> bool:
        plain = request.loss_fn == "cross_entropy" and not request.config
        whole = all("target_tokens" in datum.loss_fn_inputs for datum in data)
        return request.custom and plain and whole and not self._models.choices[model_id].base_only

    def _backward(self, backend: TorchBackend, model_id: str, data: list[Datum], request: GradientRequest) -> Answer:
        if not request.custom:
            return _settled(backend.forward_backward(data, request.loss_fn, request.config), _output)
        retained = self.graphs.take(model_id, datum_keys(data))
        if retained and not request.config:
            self._count("graph_tokens_reused", sum(forward.tokens for forward in retained))
            return _settled(backend.backward(retained, data, request.loss_fn), _custom_output)
        self._count("graph_tokens_recomputed", sum(len(datum.model_input) for datum in data))
        return _settled(backend.forward_backward(data, request.loss_fn, request.config), _custom_output)


def _refusal(failures: list[FailedGradient]) -> str:
    first, more = failures[0], len(failures) - 1
    others = f", and {more} more" if more else ""
    return (
        f"an earlier gradient operation failed (seq_id {first.number}: {first.text}){others}, and this step was sent before "
        "that was known, so it was not made; the accumulation holds the gradients that succeeded: send the failed ones again, "
        "or step without them"
    )


def _step_of(body: Json) -> tuple[AdamParams, Any]:
    """Return parameters and normalisation of a step.

    The normalisation has a field of its own (Fireworks' client), or lies among the parameters of an optimizer that is named
    (the tinker SDK's form for an optimizer that it does not know).
    """
    params = body.get("optimizer_params") if body.get("adam_params") is None else body["adam_params"]
    if params is None:
        raise ConfigError("a step needs adam_params, or optimizer_params with the type adamw")
    given = {k: v for k, v in params.items() if v is not None}
    given.pop("emit_grad_norm_metrics", None)
    if (kind := given.pop("type", "adamw")) != "adamw":
        raise ConfigError(f"this server's optimizer is adamw, got {kind!r}")
    named, mode = given.pop("grad_accumulation_normalization", "none"), body.get("grad_accumulation_normalization")
    mode = named if mode is None else mode
    if not isinstance(mode, (str, int, float)) or (isinstance(mode, str) and mode not in _MODES):
        raise ConfigError(f"grad_accumulation_normalization must be a number or one of {sorted(_MODES)}, got {mode!r}")
    unknown = sorted(set(given) - {field.name for field in fields(AdamParams)})
    if unknown:
        raise ConfigError(f"the optimizer's parameters have keys that this server does not know: {unknown}")
    return AdamParams(**given), _MODES[mode] if isinstance(mode, str) else mode


def _settled(future: Future[T], encode: Callable[[T], Answer]) -> Answer:
    """Return the answer of a finished operation, or its failure."""
    error = future.exception()
    return encode(future.result()) if error is None else failure_of(error)


def _custom_output(output: ForwardBackwardOutput) -> bytes:
    """Return the answer to the backward of a custom loss, whose weights are its cotangent: by them no likelihood is a mean."""
    return _output(replace(output, metrics={name: x for name, x in output.metrics.items() if name != "nll:mean"}))


def _output(output: ForwardBackwardOutput) -> bytes:
    outputs = [dict(fields) for fields in output.loss_fn_outputs]
    if any("scored" in fields for fields in outputs):
        for fields in outputs:
            ones = fields["logprobs"].to_torch().new_ones(fields["logprobs"].shape[:1])
            fields.setdefault("scored", TensorData(ones))
    return encode_output(outputs, output.metrics)
