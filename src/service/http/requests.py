"""One HTTP request as the routes see it, and how its answer or refusal is written."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, Final, final

from ...errors import BusyError, NotFoundError, PullbackError, ServiceError, StorageError, TooLargeError
from ..limits import Limits
from ..wire.json_bounds import JsonBounds, parse_json
from ..wire.protobuf_bounds import WireBounds
from ..wire.texts import require_writable, words_of
from .bodies import HeldBytes

__all__ = ["Bounds", "Call", "json_response", "prompt_length", "refusal"]

_AT_ONCE: Final = 1 << 16  # bytes of JSON, which are parsed in less than a millisecond
_AS_OBJECTS: Final = 2  # times the bytes of JSON, at least
_SMALL_BYTES, _SMALL_VALUES, _SMALL_CONTAINERS = 1 << 21, 100_000, 20_000
_SAMPLE_BYTES, _SAMPLE_VALUES = 1 << 26, 1 << 22
_PER_DATUM: Final = 40  # lists and objects of its tensors and chunks
_FIELDS_PER_DATUM: Final = 100
_SPARSE: Final = 1 << 22

_CUSTOM: Final = "TrainingClient.forward_backward_custom"
_IDS: Final = ("model_id", "session_id", "request_id", "sampling_session_id")
_TYPES: Final[dict[str, type]] = {
    **dict.fromkeys(_IDS, str),
    **dict.fromkeys(("path", "model_path", "tinker_path", "base_model"), str),
    **dict.fromkeys(("seq_id", "model_seq_id", "custom_loss_seq_id", "sampling_session_seq_id"), int),
    **dict.fromkeys(("forward_input", "forward_backward_input", "adam_params", "lora_config", "user_metadata"), dict),
    **dict.fromkeys(("sampling_params", "prompt", "graph", "optimizer_params", "optimizer_config"), dict),
}
Json = dict[str, Any]


@final
class Call:
    """One request: whose it is, and what it holds.

    Args:
        request: starlette's.
        owner: of the key that it came with.
        raw: its body, unpacked.
        bounds: of its JSON.
        held: what it takes of the memory for bodies.

    Attributes:
        keeps: whether its body is still needed when it has been answered.
    """

    def __init__(self, request: Any, owner: str, raw: bytes, bounds: JsonBounds, held: HeldBytes) -> None:
        self.request, self.owner, self.raw = request, owner, raw
        self._bounds, self._held, self.keeps = bounds, held, False
        self.query: dict[str, str] = dict(request.query_params)
        self.path: dict[str, str] = dict(request.path_params)
        self._content: Any = None

    def keep_until(self, ended: Future[Any]) -> None:
        """Take the memory of the body until an operation has ended; as objects, JSON takes several times its bytes."""
        self.keeps = True
        ended.add_done_callback(lambda _: self._held.release())

    async def load(self) -> None:
        """Parse the JSON body, off the event loop where it is large.

        Raises:
            BusyError: the objects that it becomes would take too much beside those of other requests.
            TooLargeError: it is over the bounds; nothing was parsed.
            ServiceError: it is no JSON.
        """
        if len(self.raw) <= _AT_ONCE:
            self._content = parse_json(self.raw, self._bounds)
        else:
            self._held.add(_AS_OBJECTS * len(self.raw))
            self._content = await asyncio.to_thread(parse_json, self.raw, self._bounds)

    @property
    def body(self) -> Json:
        """The JSON body, once it is loaded.

        Raises:
            ServiceError: it is no object, a field is of another type, or an id holds half of a character.
        """
        content = self._content
        if not isinstance(content, dict):
            raise ServiceError("the body must be a JSON object")
        for key, kind in _TYPES.items():
            if not isinstance(content.get(key), (kind, type(None))) or isinstance(content.get(key), bool):
                raise ServiceError(f"{key} must be of type {kind.__name__}, got {type(content[key]).__name__}")
        for key in _IDS:
            require_writable(key, content.get(key))
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


@final
class Bounds:
    """What requests of each kind may hold, from the limits of the service.

    Attributes:
        small: JSON of every request but those below.
        sample: JSON of a prompt.
        gradient: JSON of datums.
        wire: protobuf of datums.
    """

    def __init__(self, limits: Limits) -> None:
        most, containers = limits.body_bytes, max(_SMALL_CONTAINERS, _PER_DATUM * limits.datums)
        self.small = JsonBounds(min(most, _SMALL_BYTES), _SMALL_VALUES, _SMALL_CONTAINERS)
        self.sample = JsonBounds(min(most, _SAMPLE_BYTES), _SAMPLE_VALUES, _SMALL_CONTAINERS)
        self.gradient = JsonBounds(most, max(_SMALL_VALUES, 4 * limits.tokens), containers)
        self.wire = WireBounds(limits.datums, limits.tokens, _FIELDS_PER_DATUM * max(200, limits.datums), _SPARSE)


def prompt_length(body: Json) -> int:
    """Return how many tokens the prompt of a request has; what is malformed is left to those who read it."""
    chunks = (body.get("prompt") or {}).get("chunks")
    if not isinstance(chunks, list):
        return 0
    tokens = [chunk.get("tokens") for chunk in chunks if isinstance(chunk, dict)]
    return sum(len(given) for given in tokens if isinstance(given, list))


def json_response(content: Json, status: int = 200) -> Any:
    """Return a JSON answer."""
    from starlette.responses import JSONResponse

    return JSONResponse(content, status)


def refusal(error: Exception) -> Any:
    """Return the answer to a request that was not accepted.

    Raises:
        Exception: the error itself, where it is not a mistake of the client's.
    """
    words = words_of(error)
    if isinstance(error, BusyError):
        response = json_response({"detail": words}, 429)
        response.headers["retry-after"] = "1"
        return response
    if isinstance(error, TooLargeError):
        return json_response({"detail": words}, 413)
    if isinstance(error, StorageError):
        response = json_response({"detail": words}, 507)
        response.headers["x-should-retry"] = "false"  # asking again at once would not help
        return response
    if isinstance(error, NotFoundError):
        return json_response({"detail": words}, 404)
    if isinstance(error, PullbackError):
        return json_response({"detail": words}, 400)
    if isinstance(error, (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)):
        what = "" if isinstance(error, UnicodeEncodeError) else f"{type(error).__name__} "
        return json_response({"detail": f"malformed request: {what}{words}"}, 400)
    raise error
