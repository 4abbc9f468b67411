"""The routes of the Tinker protocol (extra ``serve``)."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, final

from ..errors import BusyError, PullbackError, ServiceError, TooLargeError, require_extra
from ..losses import loss_names
from .journal import Failure, Journal, hold_folder
from .json_form import decode_json_request, json_result
from .limits import Keys, Limits, read_body
from .listings import Listings
from .operations import Operations
from .sequencer import Sequencer
from .telemetry import Telemetry
from .tenants import Tenants
from .wire import decode_request

__all__ = ["build_app"]

_PROTOBUF: Final = "application/x-protobuf"
_CUSTOM: Final = "TrainingClient.forward_backward_custom"
# A pair is never cut into two requests.
_CLIENT: Final = {
    "fwdbwd_max_chunk_len": 100_000,
    "fwdbwd_max_chunk_bytes_count": 200_000_000,
    "custom_loss_server_side": True,
}
_TYPES: Final[dict[str, type]] = {
    **dict.fromkeys(("model_id", "session_id", "request_id", "sampling_session_id"), str),
    **dict.fromkeys(("path", "model_path", "tinker_path", "base_model"), str),
    **dict.fromkeys(("seq_id", "model_seq_id", "custom_loss_seq_id", "sampling_session_seq_id"), int),
    **dict.fromkeys(("forward_input", "forward_backward_input", "adam_params", "lora_config", "user_metadata"), dict),
    **dict.fromkeys(("sampling_params", "prompt", "graph"), dict),
}
Json = dict[str, Any]
Handler = Callable[["Call"], Awaitable[Any]]


@final
class Call:
    """One request: whose it is, and what it holds."""

    def __init__(self, request: Any, owner: str, raw: bytes) -> None:
        self.request, self.owner, self.raw = request, owner, raw
        self.query: dict[str, str] = dict(request.query_params)
        self.path: dict[str, str] = dict(request.path_params)

    @property
    def body(self) -> Json:
        """The JSON body.

        Raises:
            ServiceError: it is no object.
        """
        found = json.loads(self.raw)
        if not isinstance(found, dict):
            raise ServiceError("the body must be a JSON object")
        for key, kind in _TYPES.items():
            if not isinstance(found.get(key), (kind, type(None))) or isinstance(found.get(key), bool):
                raise ServiceError(f"{key} must be of type {kind.__name__}, got {type(found[key]).__name__}")
        return found

    @property
    def custom(self) -> bool:
        """Whether it is one half of the SDK's custom loss."""
        return bool(self.request.headers.get("x-sdk-method", "") == _CUSTOM)

    @property
    def forked(self) -> bool:
        """Whether it comes from a fork of the SDK: it names the release that it was made from, and its own."""
        agent, package = (self.request.headers.get(key, "") for key in ("user-agent", "x-stainless-package-version"))
        return agent.startswith("AsyncTinker/") and bool(package) and not agent.endswith(f" {package}")


def build_app(tenants: Tenants, keys: Keys, limits: Limits) -> Any:
    """Return the ASGI application.

    Args:
        tenants: the models.
        keys: who is let in.
        limits: sizes and counts.
    """
    require_extra("starlette", "serve", "pullback serve")
    from starlette.applications import Starlette

    app = _App(tenants, keys, limits)
    return Starlette(routes=app.routes(), lifespan=app.lifespan)


@final
class _App:
    """Routes over `Operations`: reading requests, naming owners, writing answers."""

    def __init__(self, tenants: Tenants, keys: Keys, limits: Limits) -> None:
        self.keys, self.limits, self.telemetry = keys, limits, Telemetry()
        self.held = hold_folder(tenants.checkpoints.root)
        self.journal = Journal(tenants.checkpoints.root / "journal.sqlite")
        self.sequencer = Sequencer(
            self.journal,
            max_queue=limits.queue,
            gap_seconds=limits.gap_seconds,
            observer=self.telemetry.operation,
        )
        self.operations = Operations(tenants, self.journal, self.sequencer, limits, self.telemetry.count)
        self.listings = Listings(tenants, self.journal)
        self.tenants = tenants
        gauge = self.telemetry.gauge
        gauge("queue", "operations that wait or run", lambda: self.sequencer.queued)
        gauge("models", "models in memory", lambda: len(tenants.backends))
        gauge("samplers", "sampling sessions in memory", lambda: len(self.operations.samplers))
        gauge("lease_bytes", "graphs kept for custom losses", lambda: self.operations.leases.bytes)

    async def _lifespan(self) -> Any:
        task = asyncio.create_task(self._sweep())
        yield
        task.cancel()
        await asyncio.to_thread(self.sequencer.close)
        self.journal.close()
        self.held.close()

    @property
    def lifespan(self) -> Any:
        from contextlib import asynccontextmanager

        return asynccontextmanager(lambda _: self._lifespan())

    async def _sweep(self) -> None:
        """Let go of old leases even where no request comes any more."""
        while True:
            await asyncio.sleep(self.limits.lease_seconds / 4)
            self.sequencer.run(self.operations.leases.sweep)

    def routes(self) -> list[Any]:
        """All routes."""
        post, get = self._post, self._get
        do, lists = self.operations, self.listings
        return [
            post("client/config", self._constant(_CLIENT)),
            post("client/dynamic_config", self._constant({})),
            get("healthz", self._constant({"status": "ok"})),
            get("get_server_capabilities", self._constant(self._capabilities())),
            post("telemetry", self._constant({"status": "accepted"})),
            post("session_heartbeat", self._heartbeat),
            post("create_session", self._create_session),
            post("sessions/{id}/finish", self._finish),
            post("create_model", self._accepted(do.create_model)),
            post("unload_model", self._accepted(do.unload)),
            post("get_info", self._now(lambda call: lists.info(call.owner, call.body["model_id"]))),
            post("create_custom_loss", self._accepted(do.create_loss)),
            post("forward", self._gradient(forward_only=True)),
            post("forward_backward", self._gradient(forward_only=False)),
            post("optim_step", self._accepted(do.optim_step)),
            post("save_weights", self._accepted(do.save_weights)),
            post("load_weights", self._accepted(do.load_weights)),
            post("load_adapter", self._accepted(do.load_adapter)),
            get("list_checkpoints", self._now(lambda call: {"checkpoints": do.names.listing(call.owner)})),
            post("save_weights_for_sampler", self._accepted(do.save_for_sampler)),
            post("create_sampling_session", self._now(self._create_sampling_session)),
            get("samplers/{id:path}", self._now(lambda call: do.samplers.info(call.owner, call.path["id"]))),
            post("asample", self._now(lambda call: do.samplers.sample(call.owner, call.raw, call.body))),
            post("retrieve_future", self._retrieve),
            post("weights_info", self._now(lambda call: lists.weights_info(call.owner, call.body["tinker_path"]))),
            get("training_runs", self._now(lambda call: lists.runs(call.owner, call.query))),
            get("training_runs/{id}", self._now(lambda call: lists.run(call.owner, call.path["id"]))),
            get(
                "training_runs/{id}/checkpoints",
                self._now(lambda call: lists.checkpoints(call.owner, call.query, call.path["id"])),
            ),
            self._route("training_runs/{id}/checkpoints/{checkpoint:path}", self._delete, "DELETE"),
            get("checkpoints", self._now(lambda call: lists.checkpoints(call.owner, call.query))),
            get("sessions", self._now(lambda call: lists.sessions(call.owner, call.query))),
            get("sessions/{id}", self._now(lambda call: lists.session(call.owner, call.path["id"]))),
            self._route("/metrics", self._metrics, "GET"),
        ]

    def _capabilities(self) -> Json:
        base = self.tenants.base
        model = {"model_name": base.name, "max_context_length": base.context, "trainable": True, "sampleable": True}
        ours = {"losses": list(loss_names()), "normalizes": True, "keeps_graphs": True}
        return {"supported_models": [model], "pullback": ours}

    def _post(self, path: str, handler: Handler) -> Any:
        return self._route(path, handler, "POST")

    def _get(self, path: str, handler: Handler) -> Any:
        return self._route(path, handler, "GET")

    def _route(self, path: str, handler: Handler, method: str) -> Any:
        from starlette.routing import Route

        async def answer(request: Any) -> Any:
            began, raw = time.perf_counter(), b""
            owner = self.keys.owner(request.headers.get("x-api-key", ""))
            try:
                if owner is None:
                    response = _json({"detail": "unknown API key"}, 401)
                else:
                    raw = await read_body(request, self.limits.body_bytes)
                    response = await handler(Call(request, owner, raw))
            except Exception as error:
                response = _refusal(error)
            self.telemetry.request(path, response.status_code, time.perf_counter() - began, len(raw))
            return response

        return Route(path if path.startswith("/") else f"/api/v1/{path}", answer, methods=[method])

    def _constant(self, found: Json) -> Handler:
        async def handler(_: Call) -> Any:
            return _json(found)

        return handler

    def _now(self, work: Callable[[Call], Json]) -> Handler:
        async def handler(call: Call) -> Any:
            return _json(work(call))

        return handler

    def _accepted(self, submit: Callable[[str, bytes, Json], str]) -> Handler:
        async def handler(call: Call) -> Any:
            body = call.body
            return _json({"request_id": submit(call.owner, call.raw, body), "model_id": body.get("model_id")})

        return handler

    def _gradient(self, *, forward_only: bool) -> Handler:
        async def handler(call: Call) -> Any:
            if call.request.headers.get("content-type", "").startswith(_PROTOBUF):
                request = await asyncio.to_thread(decode_request, call.raw, call.custom)
            else:
                # Forks do not say what a request is part of: any may be one half of a custom loss.
                custom = call.custom or "x-sdk-method" not in call.request.headers
                request = decode_json_request(call.raw, call.body, forward_only, custom)
            return _json({"request_id": self.operations.gradient(call.owner, request), "model_id": request.model_id})

        return handler

    async def _create_session(self, call: Call) -> Any:
        session = f"sess-{secrets.token_hex(8)}"
        self.journal.add_session(session, call.owner, call.body.get("user_metadata"))
        return _json({"type": "create_session", "session_id": session, "info_message": None})

    async def _heartbeat(self, call: Call) -> Any:
        self.operations.require_session(call.owner, call.body["session_id"])
        return _json({"type": "session_heartbeat"})

    async def _finish(self, call: Call) -> Any:
        from starlette.responses import Response

        session = self.operations.require_session(call.owner, call.path["id"])
        self.sequencer.run(lambda: self.operations.finish(session))
        return Response(status_code=204)

    def _create_sampling_session(self, call: Call) -> Json:
        body = call.body
        session = self.operations.require_session(call.owner, body["session_id"])
        return self.operations.samplers.create(
            f"{session}:sample:{int(body['sampling_session_seq_id'])}", call.owner, body
        )

    async def _retrieve(self, call: Call) -> Any:
        from starlette.responses import Response

        body = call.body
        request_id = body["request_id"]
        future = self.sequencer.result(call.owner, request_id)
        try:
            found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), self.limits.poll_seconds)
        except TimeoutError:
            return _json({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
        if (
            body.get("allow_metadata_only") is True
            and isinstance(found, bytes)
            and len(found) > self.limits.large_bytes
        ):
            return _json({"status": "complete_metadata", "response_payload_size": len(found)})
        self.operations.delivered(request_id)
        if isinstance(found, Failure):
            return _json({"error": found.text, "category": found.category})
        if isinstance(found, dict):
            return _json(self.operations.names.shown(found) if call.forked else found)
        accepts = call.request.headers.get("accept", "*/*")
        if _PROTOBUF in accepts or "*/*" in accepts:
            return Response(found, media_type=_PROTOBUF)
        operation = self.journal.operation(request_id)
        return _json(json_result(operation.kind if operation else "", found))

    async def _delete(self, call: Call) -> Any:
        from starlette.responses import Response

        self.listings.delete(call.owner, call.path["id"], call.path["checkpoint"])
        return Response(status_code=204)

    async def _metrics(self, _: Call) -> Any:
        from starlette.responses import Response

        return Response(self.telemetry.exposition(), media_type="text/plain; version=0.0.4")


def _json(found: Json, status: int = 200) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(found, status)


def _refusal(error: Exception) -> Any:
    """Say why a request was not accepted; what is not a client's mistake goes up."""
    if isinstance(error, BusyError):
        response = _json({"detail": str(error)}, 429)
        response.headers["retry-after"] = "1"
        return response
    if isinstance(error, TooLargeError):
        return _json({"detail": str(error)}, 413)
    if isinstance(error, ServiceError) and str(error).startswith("there is no"):
        return _json({"detail": str(error)}, 404)
    if isinstance(error, PullbackError):
        return _json({"detail": str(error)}, 400)
    if isinstance(error, (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)):
        return _json({"detail": f"malformed request: {type(error).__name__} {error}"}, 400)
    raise error
