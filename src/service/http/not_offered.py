"""Routes of the protocol that this service does not offer: each says so, and what there is instead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from ...errors import UnsupportedError
from .requests import Call

__all__ = ["NOT_OFFERED", "refused"]

_PUBLISH: Final = "checkpoints are not published by this server: each key reaches its own; download one to pass it on"
_BILLS: Final = (
    "this server keeps no bills: listings say how many bytes each checkpoint has, and /metrics what was computed"
)
_KEYS: Final = (
    "keys are neither exchanged nor deleted by their holders here: whoever runs this server adds and removes them"
)

NOT_OFFERED: Final = (
    ("POST", "training_runs/{id}/checkpoints/{checkpoint:path}/publish", _PUBLISH),
    ("DELETE", "training_runs/{id}/checkpoints/{checkpoint:path}/publish", _PUBLISH),
    ("GET", "billing/usage/events", _BILLS),
    ("GET", "billing/usage/checkpoints/current", _BILLS),
    ("GET", "audit", "this server keeps no audit log; its journal holds every operation and its answer"),
    ("POST", "sessions/search", "sessions are not searched by this server: list them, and filter at the client"),
    ("PUT", "sessions/{id}/project", "this server has no projects: what a key has made belongs to that key"),
    ("GET", "sessions/{id}/trace_export", "this server keeps no traces; /metrics has counts and durations"),
    ("GET", "auth/apikey/me", _KEYS),
    ("DELETE", "auth/apikey/me", _KEYS),
    ("POST", "auth/token", _KEYS),
)


def refused(reason: str) -> Callable[[Call], Awaitable[Any]]:
    """Return a handler that refuses."""

    async def handler(_: Call) -> Any:
        raise UnsupportedError(reason)

    return handler
