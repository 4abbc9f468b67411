"""What the protocol's requests do to the models; each returns the answer as it goes on the wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, final

from ..backends import AdamParams, SamplingParams
from ..backends.futures import FinishedFuture
from ..backends.types import ForwardBackwardOutput
from ..datums.types import Datum, ModelInput, TensorData
from ..errors import ConfigError, PrecedingOperationFailed, ServiceError
from .sequencer import Failure, Sequencer
from .tenants import LoraChoice, Sampler, Tenants, tokens_of
from .wire import encode_output, encode_sample

__all__ = ["Operations"]

T = TypeVar("T")
Json = dict[str, Any]
_MODES: dict[str, Any] = {"none": None, "num_loss_tokens": "num_loss_tokens", "num_sequences": "num_sequences"}


@final
class Operations:
    """The service below its routes: sessions, models, samplers.

    Args:
        tenants: the models.
        sequencer: runs operations in order.
    """

    def __init__(self, tenants: Tenants, sequencer: Sequencer) -> None:
        self.tenants, self.sequencer = tenants, sequencer
        self.samplers: dict[str, Sampler] = {}
        self._undelivered: dict[str, set[str]] = {}

    def create_model(self, body: Json) -> str:
        """Make a model with a fresh adapter, or (with ``path``) from a checkpoint; return the request id."""
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        self.sequencer.open(model_id)

        def work() -> Json:
            if "path" in body:
                source = body["path"].removeprefix("tinker://").split("/")[0]
                if source not in self.tenants.choices:
                    raise ServiceError(f"the model of {body['path']} is not known to this server since its start")
                self.tenants.locate(body["path"])
                self.tenants.create(model_id, self.tenants.choices[source])
                self.tenants.load(model_id, body["path"], body.get("optimizer", False))
                return {"path": body["path"], "model_id": model_id, "type": "load_weights"}
            self.tenants.create(model_id, self._lora(body))
            return {"model_id": model_id, "type": "create_model"}

        return self.sequencer.submit_unordered(work)

    def _lora(self, body: Json) -> LoraChoice:
        if body.get("base_model") != self.tenants.base.name:
            raise ConfigError(f"this server serves {self.tenants.base.name!r}, not {body.get('base_model')!r}")
        given = {k: v for k, v in (body.get("lora_config") or {}).items() if v is not None}
        unknown = sorted(set(given) - {"rank", "seed", "train_attn", "train_mlp", "train_unembed"})
        if unknown:
            raise ConfigError(f"lora_config has keys that this server does not know: {unknown}")
        return LoraChoice(**{"rank": 32, **given})

    def gradient(self, body: bytes, request: Any, data: list[Datum], config: Json) -> str:
        """``forward_backward``, or ``forward`` where the request says so."""

        def work() -> Any:
            backend = self._backend(request.model_id)
            if request.forward_only:
                future = backend.forward(data, request.loss_fn, config)
            else:
                future = backend.forward_backward(data, request.loss_fn, config)
            return _settled(future, _output)

        accepted = self.sequencer.submit(request.model_id, request.seq_id, body, work)
        if not request.forward_only:
            self._undelivered.setdefault(request.model_id, set()).add(accepted)
        return accepted

    def delivered(self, request: str) -> None:
        """Note that a client has the result of a request."""
        for waiting in self._undelivered.values():
            waiting.discard(request)

    def optim_step(self, raw: bytes, body: Json) -> str:
        """One AdamW step, normalised if the request says so.

        A step that was sent before the client had the failure of a gradient is refused: it would be a step without it.
        """
        unknown = frozenset(self._undelivered.get(body["model_id"], ()))

        def work() -> Any:
            for request in unknown:
                found = self.sequencer.result(request).result()
                if isinstance(found, Failure):
                    raise PrecedingOperationFailed(
                        f"an earlier gradient operation failed ({found.text}) and this step was sent before that was known; "
                        "the window holds the other gradients: step again, or go on without them"
                    )
            mode = body.get("grad_accumulation_normalization")
            if mode is not None and mode not in _MODES:
                raise ConfigError(f"grad_accumulation_normalization must be one of {sorted(_MODES)}, got {mode!r}")
            params = AdamParams(**{k: v for k, v in body["adam_params"].items() if v is not None})
            future = self._backend(body["model_id"]).optim_step(params, _MODES[mode or "none"])
            return _settled(future, lambda output: {"metrics": dict(output.metrics)})

        return self.sequencer.submit(body["model_id"], body["seq_id"], raw, work)

    def save_weights(self, raw: bytes, body: Json) -> str:
        """A checkpoint with everything."""

        def work() -> Json:
            uri = self.tenants.save(body["model_id"], body["path"], bool(body.get("overwrite", False)))
            return {"path": uri, "type": "save_weights"}

        return self.sequencer.submit(body["model_id"], body["seq_id"], raw, work)

    def load_weights(self, raw: bytes, body: Json) -> str:
        """Load into a model that exists, or make one from a checkpoint."""
        if "model_id" not in body:
            return self.create_model(body)

        def work() -> Json:
            self.tenants.load(body["model_id"], body["path"], bool(body.get("optimizer", False)))
            return {"path": body["path"], "model_id": body["model_id"], "type": "load_weights"}

        return self.sequencer.submit(body["model_id"], body["seq_id"], raw, work)

    def save_for_sampler(self, raw: bytes, body: Json) -> str:
        """Freeze the present weights: under a name, or for one sampling session."""
        model_id, name = body["model_id"], body.get("path")

        def work() -> Json:
            sampler = self.tenants.sampler(model_id)
            if name is not None:
                uri = f"tinker://{model_id}/sampler_weights/{name}"
                self.samplers[uri] = sampler
                return {"path": uri, "type": "save_weights_for_sampler"}
            session = f"{model_id.split(':')[0]}:sample:{body['sampling_session_seq_id']}"
            self.samplers[session] = sampler
            return {"sampling_session_id": session, "type": "save_weights_for_sampler"}

        return self.sequencer.submit(model_id, body["seq_id"], raw, work)

    def create_sampling_session(self, body: Json) -> Json:
        """A session on saved weights, or on the base."""
        session = f"{body['session_id']}:sample:{body['sampling_session_seq_id']}"
        path = body.get("model_path")
        if path is not None and path not in self.samplers:
            raise ServiceError(f"there are no sampler weights {path} on this server")
        self.samplers[session] = self.samplers[path] if path is not None else self.tenants.base_sampler()
        self.sequencer.open(session, first=0)
        return {"type": "create_sampling_session", "sampling_session_id": session}

    def sample(self, body: Json) -> Json:
        """Draw completions of one prompt; with ``prompt_logprobs`` score it."""
        session, n = body["sampling_session_id"], int(body.get("num_samples", 1))
        if session not in self.samplers:
            raise ServiceError(f"unknown sampling session {session!r}")
        for key in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k", "target_prompt_logprobs"):
            if body.get(key):
                raise ConfigError(f"{key} is not supported by this server")
        sampler = self.samplers[session]

        def work() -> bytes:
            prompt = ModelInput.from_ints(tokens_of(body["prompt"]["chunks"]))
            rollouts = sampler.sample(prompt, n, _sampling(body["sampling_params"]))
            scores = sampler.prompt_logprobs(prompt) if body.get("prompt_logprobs") else None
            return encode_sample([(r.stop_reason, r.tokens, r.logprobs) for r in rollouts], scores)

        request = self.sequencer.submit_unordered(work)
        return {
            "request_id": request,
            "sample_sequence_ids": [f"{session}:{body.get('seq_id', 0)}:{i}" for i in range(n)],
        }

    def _backend(self, model_id: str) -> Any:
        if model_id not in self.tenants.backends:
            raise ServiceError(f"model {model_id!r} could not be created; read the error of its creation")
        return self.tenants.backends[model_id]


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    known = {"max_tokens", "temperature", "top_k", "top_p", "stop", "seed"}
    unknown = sorted(k for k, v in given.items() if k not in known and v is not None)
    if unknown:
        raise ConfigError(f"sampling_params has keys that this server does not know: {unknown}")
    chosen = {k: v for k, v in given.items() if v is not None}
    stop = chosen.get("stop")
    if stop is not None and not (isinstance(stop, list) and all(isinstance(t, int) for t in stop)):
        raise ConfigError("stop must be a list of token ids on this server; strings need a tokenizer")
    return SamplingParams(**chosen)


def _settled(future: FinishedFuture[T], encode: Callable[[T], Any]) -> Any:
    """Return the answer of a finished operation, or its failure; a step knows of it by `Operations.optim_step`."""
    error = future.exception()
    return encode(future.result()) if error is None else Failure.of(error)


def _output(output: ForwardBackwardOutput) -> bytes:
    outputs = [dict(one) for one in output.loss_fn_outputs]
    if any("scored" in one for one in outputs):
        for one in outputs:
            ones = one["logprobs"].to_torch().new_ones(one["logprobs"].shape[:1])
            one.setdefault("scored", TensorData(ones))
    return encode_output(outputs, output.metrics)
