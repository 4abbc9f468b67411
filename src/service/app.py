"""The routes of the Tinker protocol (extra ``serve``)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..errors import PullbackError, require_extra
from ..losses import loss_names
from .operations import Operations
from .sequencer import Failure, Sequencer
from .tenants import Tenants
from .wire import decode_request

__all__ = ["build_app"]

_POLL_SECONDS = 30.0
_LIMITS = {"fwdbwd_max_chunk_len": 100_000, "fwdbwd_max_chunk_bytes_count": 256_000_000}  # a pair is never cut
Handler = Callable[[Any], Awaitable[Any]]


def build_app(tenants: Tenants, keys: Sequence[str] = (), poll_seconds: float = _POLL_SECONDS) -> Any:
    """Return the ASGI application.

    Args:
        tenants: the models.
        keys: API keys that are let in; empty = everybody (for a loopback address only).
        poll_seconds: how long a request for a result is held before it must be asked for again.
    """
    require_extra("starlette", "serve", "pullback serve")
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    operations = Operations(tenants, Sequencer())
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    base = tenants.base

    def allowed(request: Any) -> bool:
        given = hashlib.sha256(request.headers.get("x-api-key", "").encode()).digest()
        return not digests or any([hmac.compare_digest(given, digest) for digest in digests])

    def route(path: str, handler: Handler, method: str = "POST") -> Route:
        async def answer(request: Any) -> Response:
            if not allowed(request):
                return JSONResponse({"detail": "unknown API key"}, 401)
            try:
                found = await handler(request)
            except PullbackError as error:
                return JSONResponse({"detail": str(error)}, 400)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                return JSONResponse({"detail": f"malformed request: {type(error).__name__} {error}"}, 400)
            return found if isinstance(found, Response) else JSONResponse(found)

        return Route(f"/api/v1/{path}", answer, methods=[method])

    def constant(answer: dict[str, Any]) -> Handler:
        async def handler(_: Any) -> dict[str, Any]:
            return answer

        return handler

    def accepted(submit: Callable[[bytes, dict[str, Any]], str]) -> Handler:
        async def handler(request: Any) -> dict[str, Any]:
            raw = await request.body()
            body = json.loads(raw)
            return {"request_id": submit(raw, body), "model_id": body.get("model_id")}

        return handler

    async def create_session(_: Any) -> dict[str, Any]:
        return {"type": "create_session", "session_id": f"sess-{secrets.token_hex(4)}", "info_message": None}

    async def forward_backward(request: Any) -> dict[str, Any]:
        raw = await request.body()
        message, data, config = decode_request(raw)
        return {"request_id": operations.gradient(raw, message, data, config), "model_id": message.model_id}

    async def get_info(request: Any) -> dict[str, Any]:
        model_id = (await request.json())["model_id"]
        lora = tenants.choices[model_id]
        names = {"arch": type(base.model).__name__, "model_name": base.name, "tokenizer_id": base.tokenizer_id}
        return {
            "type": "get_info",
            "model_id": model_id,
            "model_data": names,
            "optimizer_config": {"type": "adamw"},
            "is_lora": True,
            "lora_rank": lora.rank,
            "model_name": base.name,
        }

    async def retrieve(request: Any) -> Any:
        request_id = (await request.json())["request_id"]
        future = operations.sequencer.result(request_id)
        try:
            found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), poll_seconds)
        except TimeoutError:
            return JSONResponse({"type": "try_again", "queue_state": "active"}, 408)
        operations.delivered(request_id)
        if isinstance(found, Failure):
            return {"error": found.text, "category": found.category}
        return Response(found, media_type="application/x-protobuf") if isinstance(found, bytes) else _finite(found)

    async def create_sampling_session(request: Any) -> dict[str, Any]:
        return operations.create_sampling_session(await request.json())

    async def sample(request: Any) -> dict[str, Any]:
        return operations.sample(await request.json())

    async def sampler(request: Any) -> dict[str, Any]:
        return {"sampler_id": request.path_params["id"], "base_model": base.name, "model_path": None}

    async def finish(_: Any) -> Response:
        return Response(status_code=204)

    limit = getattr(getattr(base.model, "config", None), "max_position_embeddings", None)
    models = [{"model_name": base.name, "max_context_length": limit, "trainable": True, "sampleable": True}]
    capabilities = {"supported_models": models, "pullback": {"losses": loss_names()}}
    return Starlette(
        routes=[
            route("client/config", constant(_LIMITS)),
            route("client/dynamic_config", constant({})),
            route("healthz", constant({"status": "ok"}), "GET"),
            route(
                "get_server_capabilities",
                constant(capabilities),
                "GET",
            ),
            route("telemetry", constant({"status": "accepted"})),
            route("session_heartbeat", constant({"type": "session_heartbeat"})),
            route("create_session", create_session),
            route("sessions/{id}/finish", finish),
            route("create_model", accepted(lambda _, body: operations.create_model(body))),
            route("get_info", get_info),
            route("forward_backward", forward_backward),
            route("optim_step", accepted(operations.optim_step)),
            route("save_weights", accepted(operations.save_weights)),
            route("load_weights", accepted(operations.load_weights)),
            route("save_weights_for_sampler", accepted(operations.save_for_sampler)),
            route("create_sampling_session", create_sampling_session),
            route("samplers/{id:path}", sampler, "GET"),
            route("asample", sample),
            route("retrieve_future", retrieve),
        ],
    )


def _finite(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out metrics that JSON cannot hold: a client would ask again for ever."""
    metrics = answer.get("metrics")
    if metrics is None:
        return answer
    return {**answer, "metrics": {k: v for k, v in metrics.items() if math.isfinite(v)}}
