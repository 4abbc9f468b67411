"""The routes of the Tinker protocol (extra ``serve``)."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final, final

from ...errors import require_extra
from ...losses import loss_names
from ..durability.journal import Journal
from ..durability.storage import lock_folder
from ..limits import Keys, Limits, check_prompt
from ..operations import Operations
from ..queueing.sequencer import Sequencer
from ..served.listings import Listings
from ..served.registry import ServedModels
from ..stored.copies import Copies
from ..wire.json_bounds import JsonBounds
from ..wire.json_form import decode_json_request
from ..wire.protobuf import decode_request
from .bodies import BodyBudget, HeldBytes, read_body
from .client_config import client_config
from .downloads import Downloads
from .lifespan import Lifespan
from .not_offered import NOT_OFFERED, refused
from .requests import Bounds, Call, json_response, prompt_length, refusal
from .results import PROTOBUF, Results
from .telemetry import Telemetry

__all__ = ["build_app"]

_TURN_SECONDS: Final = 0.005  # of an owner whose operations are short, until the next one has its turn
Json = dict[str, Any]
Handler = Callable[[Call], Awaitable[Any]]


def build_app(models: ServedModels, keys: Keys, limits: Limits, save_seconds: float | None = None) -> Any:
    """Return the ASGI application.

    Args:
        models: the models that are served.
        keys: who is let in.
        limits: sizes and counts.
        save_seconds: at the end, models in memory are saved, in so many seconds at most; None: they are let go.
    """
    require_extra("starlette", "serve", "pullback serve")
    from starlette.applications import Starlette

    app = _App(models, keys, limits, save_seconds)
    served = Starlette(routes=app.routes(), lifespan=app.lifespan)
    served.state.service = app
    return served


@final
class _App:
    """Routes over `Operations`: reading requests, naming owners, writing answers."""

    def __init__(self, models: ServedModels, keys: Keys, limits: Limits, save_seconds: float | None) -> None:
        limits = replace(limits, shared=len(keys) > 1)
        self.keys, self.limits, self.telemetry, self.save_seconds = keys, limits, Telemetry(), save_seconds
        self.bounds, self.bodies = Bounds(limits), BodyBudget(limits.all_bodies_bytes)
        with ExitStack() as opened:
            self.folder_lock = lock_folder(models.checkpoints.root)
            opened.callback(self.folder_lock.close)
            self.journal = Journal(models.checkpoints.root / "journal.sqlite")
            opened.callback(self.journal.close)
            self._serve(models)
            opened.pop_all()

    def _serve(self, models: ServedModels) -> None:
        limits = self.limits
        self.sequencer = Sequencer(self.journal, limits, self.telemetry.operation, _TURN_SECONDS)
        self.operations = Operations(models, self.journal, self.sequencer, limits, self.telemetry.count)
        self.listings = Listings(models, self.journal)
        self.downloads = Downloads(models.checkpoints, self.listings)
        do = self.operations
        self.copies = Copies(
            models.checkpoints, self.journal, self.sequencer, do.sessions, self.listings, do.require_space
        )
        self.models, self.results = models, Results(self.operations, self.sequencer, limits)
        gauge = self.telemetry.gauge
        gauge("queue", "operations that wait or run", lambda: self.sequencer.queued)
        gauge("polls", "requests that wait for a result", lambda: len(self.results.polls))
        gauge("models", "models in memory", lambda: len(models.backends))
        gauge("samplers", "sampling sessions in memory", lambda: len(self.operations.samplers))
        gauge("body_bytes", "bodies of requests in memory", lambda: self.bodies.used)
        gauge("graph_bytes", "graphs kept for custom losses", lambda: self.operations.training.graphs.bytes)

    @property
    def lifespan(self) -> Any:
        """See `Lifespan`."""
        return Lifespan(self.operations, self.limits, self.folder_lock, self.save_seconds).run

    def routes(self) -> list[Any]:
        """All routes."""
        from starlette.routing import Route

        post, get = self._post, self._get
        do, lists = self.operations, self.listings
        return [
            post("client/config", self._client_config),
            post("client/dynamic_config", self._constant({})),
            get("healthz", self._health),
            get("get_server_capabilities", self._constant(self._capabilities())),
            post("telemetry", self._constant({"status": "accepted"})),
            post("session_heartbeat", self._heartbeat),
            post("create_session", self._create_session),
            post("sessions/{id}/finish", self._finish),
            post("create_model", self._accepted(do.create_model)),
            post("unload_model", self._accepted(do.unload)),
            post("get_info", self._now(lambda call: lists.info(call.owner, call.body["model_id"]))),
            post("create_custom_loss", self._accepted(do.training.create_loss)),
            self._route("forward", self._gradient(forward_only=True), "POST", self.bounds.gradient),
            self._route("forward_backward", self._gradient(forward_only=False), "POST", self.bounds.gradient),
            post("optim_step", self._accepted(do.training.optim_step)),
            post("save_weights", self._accepted(do.save_weights)),
            post("save_weights_external", self._accepted(do.save_external)),
            post("copy_weights", self._copy),
            post("load_weights", self._accepted(do.load_weights)),
            post("load_adapter", self._accepted(do.load_adapter)),
            get("list_checkpoints", self._listed(lambda call: {"checkpoints": do.names.listing(call.owner)})),
            post("save_weights_for_sampler", self._accepted(do.save_for_sampler)),
            post("create_sampling_session", self._now(self._create_sampling_session)),
            get("samplers/{id:path}", self._now(lambda call: do.samplers.info(call.owner, call.path["id"]))),
            self._route("asample", self._now(self._sample), "POST", self.bounds.sample),
            post("retrieve_future", self.results.retrieve),
            post("weights_info", self._listed(lambda call: lists.weights_info(call.owner, call.body["tinker_path"]))),
            get("training_runs", self._listed(lambda call: lists.runs(call.owner, call.query))),
            get("training_runs/{id}", self._listed(lambda call: lists.run(call.owner, call.path["id"]))),
            get(
                "training_runs/{id}/checkpoints",
                self._listed(lambda call: lists.checkpoints(call.owner, call.query, call.path["id"])),
            ),
            get("training_runs/{id}/checkpoints/{checkpoint:path}/external_weights_urls", self.downloads.urls),
            get("training_runs/{id}/checkpoints/{checkpoint:path}/archive", self.downloads.archive),
            Route("/api/v1/downloads/{expires}/{signature}/{model}/{kind}/{checkpoint}/{file}", self.downloads.file),
            *(self._route(path, refused(reason), method) for method, path, reason in NOT_OFFERED),
            self._route("training_runs/{id}/checkpoints/{checkpoint:path}/ttl", self._listed(self._set_ttl), "PUT"),
            self._route("training_runs/{id}/checkpoints/{checkpoint:path}", self._listed(self._delete), "DELETE"),
            get("checkpoints", self._listed(lambda call: lists.checkpoints(call.owner, call.query))),
            get("sessions", self._listed(lambda call: lists.sessions(call.owner, call.query))),
            get("sessions/{id}", self._listed(lambda call: lists.session(call.owner, call.path["id"]))),
            self._route("/metrics", self._metrics, "GET"),
        ]

    def _capabilities(self) -> Json:
        base = self.models.base
        model = {"model_name": base.name, "max_context_length": base.context, "trainable": True, "sampleable": True}
        flags = dict.fromkeys(("normalizes", "takes_divisor", "keeps_graphs", "starts_at_base"), True)
        return {"supported_models": [model], "pullback": {"losses": list(loss_names()), **flags}}

    def _post(self, path: str, handler: Handler) -> Any:
        return self._route(path, handler, "POST")

    def _get(self, path: str, handler: Handler) -> Any:
        return self._route(path, handler, "GET")

    def _route(self, path: str, handler: Handler, method: str, bounds: JsonBounds | None = None) -> Any:
        from starlette.routing import Route

        bounds = bounds or self.bounds.small

        async def answer(request: Any) -> Any:
            began, held, call = time.perf_counter(), HeldBytes(self.bodies), None
            owner = self.keys.owner(request.headers.get("x-api-key", ""))
            try:
                if owner is None:
                    response = json_response({"detail": "unknown API key"}, 401)
                else:
                    call = Call(request, owner, await read_body(request, bounds.bytes, held), bounds, held)
                    response = await handler(call)
            except Exception as error:
                response = refusal(error)
            finally:
                if call is None or not call.keeps:
                    held.release()
            size = 0 if call is None else len(call.raw)
            self.telemetry.request(path, response.status_code, time.perf_counter() - began, size)
            return response

        return Route(path if path.startswith("/") else f"/api/v1/{path}", answer, methods=[method])

    def _constant(self, content: Json) -> Handler:
        async def handler(_: Call) -> Any:
            return json_response(content)

        return handler

    def _now(self, work: Callable[[Call], Json]) -> Handler:
        async def handler(call: Call) -> Any:
            if call.request.method == "POST":
                await call.load()
            return json_response(work(call))

        return handler

    def _listed(self, work: Callable[[Call], Json | None]) -> Handler:
        """Answer by what may wait for the disk, beside the event loop."""

        async def handler(call: Call) -> Any:
            from starlette.responses import Response

            if call.request.method in ("POST", "PUT"):
                await call.load()
            answer = await asyncio.to_thread(work, call)
            return Response(status_code=204) if answer is None else json_response(answer)

        return handler

    def _accepted(self, submit: Callable[[str, bytes, Json], str]) -> Handler:
        async def handler(call: Call) -> Any:
            await call.load()
            body = call.body
            accepted = submit(call.owner, call.raw, body)
            call.keep_until(self.sequencer.result(call.owner, accepted))  # it waits with what it was sent
            return json_response({"request_id": accepted, "model_id": body.get("model_id")})

        return handler

    def _gradient(self, *, forward_only: bool) -> Handler:
        async def handler(call: Call) -> Any:
            if call.request.headers.get("content-type", "").startswith(PROTOBUF):
                request = await asyncio.to_thread(decode_request, call.raw, call.custom, self.bounds.wire)
            else:
                await call.load()
                # Forks do not say what a request is part of: any may be one half of a custom loss.
                custom = call.custom or "x-sdk-method" not in call.request.headers
                request = await asyncio.to_thread(decode_json_request, call.body, forward_only, custom)
            accepted = self.operations.training.gradient(call.owner, request)
            # Its datums wait for their turn.
            call.keep_until(self.sequencer.result(call.owner, accepted))
            return json_response({"request_id": accepted, "model_id": request.model_id})

        return handler

    async def _client_config(self, call: Call) -> Any:
        return json_response(client_config(call.request.headers.get("x-stainless-runtime-version", "")))

    async def _create_session(self, call: Call) -> Any:
        await call.load()
        session = f"sess-{secrets.token_hex(8)}"
        metadata = call.body.get("user_metadata")
        await asyncio.to_thread(self.journal.add_session, session, call.owner, metadata)
        return json_response({"type": "create_session", "session_id": session, "info_message": None})

    async def _heartbeat(self, call: Call) -> Any:
        await call.load()
        self.operations.sessions.require(call.owner, call.body["session_id"])
        return json_response({"type": "session_heartbeat"})

    async def _finish(self, call: Call) -> Any:
        from starlette.responses import Response

        session = self.operations.sessions.require(call.owner, call.path["id"])
        self.sequencer.run(lambda: self.operations.finish(session))
        return Response(status_code=204)

    def _create_sampling_session(self, call: Call) -> Json:
        body = call.body
        session = self.operations.sessions.require(call.owner, body["session_id"])
        return self.operations.samplers.create(
            f"{session}:sample:{int(body['sampling_session_seq_id'])}", call.owner, body
        )

    def _sample(self, call: Call) -> Json:
        wanted = (call.body.get("sampling_params") or {}).get("max_tokens")
        check_prompt(prompt_length(call.body), wanted, self.models.base.context)
        accepted = self.operations.samplers.sample(call.owner, call.raw, call.body)
        call.keep_until(self.sequencer.result(call.owner, accepted["request_id"]))  # the prompt waits for its turn
        return accepted

    def _delete(self, call: Call) -> None:
        self.listings.delete(call.owner, call.path["id"], call.path["checkpoint"])

    def _set_ttl(self, call: Call) -> None:
        seconds = call.body["ttl_seconds"]
        self.listings.set_ttl(call.owner, call.path["id"], call.path["checkpoint"], seconds)

    async def _copy(self, call: Call) -> Any:
        await call.load()
        key = call.request.headers.get("x-idempotency-key", "")
        return json_response(await asyncio.to_thread(self.copies.copy, call.owner, call.body, key))

    async def _health(self, _: Call) -> Any:
        failure = self.models.failure
        return json_response({"status": "ok"}) if failure is None else json_response({"detail": failure}, 503)

    async def _metrics(self, _: Call) -> Any:
        from starlette.responses import Response

        return Response(self.telemetry.exposition(), media_type="text/plain; version=0.0.4")
