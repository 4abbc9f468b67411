"""One HTTP request as the routes see it, and how its answer or refusal is written."""

from __future__ import annotations

import json
from typing import Any, Final, final

from ...errors import BusyError, NotFoundError, PullbackError, ServiceError, StorageError, TooLargeError

__all__ = ["Call", "json_response", "refusal"]

_CUSTOM: Final = "TrainingClient.forward_backward_custom"
_TYPES: Final[dict[str, type]] = {
    **dict.fromkeys(("model_id", "session_id", "request_id", "sampling_session_id"), str),
    **dict.fromkeys(("path", "model_path", "tinker_path", "base_model"), str),
    **dict.fromkeys(("seq_id", "model_seq_id", "custom_loss_seq_id", "sampling_session_seq_id"), int),
    **dict.fromkeys(("forward_input", "forward_backward_input", "adam_params", "lora_config", "user_metadata"), dict),
    **dict.fromkeys(("sampling_params", "prompt", "graph"), dict),
}
Json = dict[str, Any]


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
        content = json.loads(self.raw)
        if not isinstance(content, dict):
            raise ServiceError("the body must be a JSON object")
        for key, kind in _TYPES.items():
            if not isinstance(content.get(key), (kind, type(None))) or isinstance(content.get(key), bool):
                raise ServiceError(f"{key} must be of type {kind.__name__}, got {type(content[key]).__name__}")
        return content

    @property
    def custom(self) -> bool:
        """Whether it is one half of the SDK's custom loss."""
        return bool(self.request.headers.get("x-sdk-method", "") == _CUSTOM)

    @property
    def forked(self) -> bool:
        """Whether it comes from a fork of the SDK: it names the release that it was made from, and its own."""
        agent, package = (self.request.headers.get(key, "") for key in ("user-agent", "x-stainless-package-version"))
        return agent.startswith("AsyncTinker/") and bool(package) and not agent.endswith(f" {package}")


def json_response(content: Json, status: int = 200) -> Any:
    """Return a JSON answer."""
    from starlette.responses import JSONResponse

    return JSONResponse(content, status)


def refusal(error: Exception) -> Any:
    """Say why a request was not accepted; what is not a client's mistake goes up."""
    if isinstance(error, BusyError):
        response = json_response({"detail": str(error)}, 429)
        response.headers["retry-after"] = "1"
        return response
    if isinstance(error, TooLargeError):
        return json_response({"detail": str(error)}, 413)
    if isinstance(error, StorageError):
        response = json_response({"detail": str(error)}, 507)
        response.headers["x-should-retry"] = "false"  # asking again at once would not help
        return response
    if isinstance(error, NotFoundError):
        return json_response({"detail": str(error)}, 404)
    if isinstance(error, PullbackError):
        return json_response({"detail": str(error)}, 400)
    if isinstance(error, (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)):
        return json_response({"detail": f"malformed request: {type(error).__name__} {error}"}, 400)
    raise error
