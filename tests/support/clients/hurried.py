"""The official SDK, and our backend over it, with shorter waits and time limits; nothing else is changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tinker import _base_client
from tinker.lib import api_future_impl, internal_client_holder
from tinker.resources.futures import AsyncFuturesResource

__all__ = ["hurry", "impatient"]

# Of heartbeat and refresh. In SDK 0.38 a close that begins during one of these waits for ever.
_PERIODS = (10, 300)
_ANSWER_SECONDS = 10.0  # a healthy answer takes a fraction of it, even on a busy machine
_SDK_SECONDS = 300.0  # after which it gives a request up that has failed once


def hurry(patch: pytest.MonkeyPatch, shorter: float = 0.01, patience: float = 60.0) -> None:
    """Let the SDK wait a hundredth of its usual time before it retries, and give a request up after ``patience`` seconds."""

    async def sleep(seconds: float, *args: Any) -> Any:
        return await asyncio.sleep(seconds if seconds in _PERIODS else seconds * shorter, *args)

    for module in (internal_client_holder, api_future_impl):
        patch.setattr(module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    clock = SimpleNamespace(**{**vars(time), "time": lambda: time.time() * _SDK_SECONDS / patience})
    patch.setattr(internal_client_holder, "time", clock)
    patch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.5 * shorter)
    patch.setattr(_base_client, "MAX_RETRY_DELAY", 10.0 * shorter)
    patch.setattr(_base_client, "DEFAULT_TIMEOUT", httpx.Timeout(_ANSWER_SECONDS))
    retrieve = AsyncFuturesResource.retrieve

    async def retrieve_briefly(self: Any, **options: Any) -> Any:
        return await retrieve(self, **{**options, "timeout": _ANSWER_SECONDS})

    patch.setattr(AsyncFuturesResource, "retrieve", retrieve_briefly)
    patch.setenv("TINKER_TELEMETRY", "0")


@contextmanager
def impatient(backend: Any, seconds: float) -> Iterator[None]:
    """Give what is asked of a remote backend so many seconds, as its ``timeout`` would; connecting had all the time."""
    with pytest.MonkeyPatch.context() as patch:
        for part in (backend, backend._remote, backend._remote._dispatch):
            patch.setattr(part, "_timeout", seconds)
        yield
