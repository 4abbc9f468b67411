"""Requests that wait for a result, until it is there, their time is over, or their client has gone."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any, final

from ..durability.answers import Answer

__all__ = ["LongPolls"]


@final
class LongPolls:
    """The requests that wait for a result, all on one event loop.

    Those for one result share one wrapper of its future, so that a request that is given up leaves no callback at an
    operation that has not ended.
    """

    def __init__(self) -> None:
        self._shared: dict[str, asyncio.Future[Answer]] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    async def answer(
        self, request: Any, name: str, future: concurrent.futures.Future[Answer], seconds: float
    ) -> Answer | None:
        """Wait for an answer.

        Args:
            request: the HTTP request; its body has been read.
            name: of the operation.
            future: the operation's.
            seconds: to wait at most.

        Returns:
            The answer, or None: there is none yet.
        """
        if future.done():
            return future.result()
        shared = self._wrapped(name, future)
        gone = asyncio.ensure_future(_disconnected(request))
        either: set[asyncio.Future[Any]] = {shared, gone}
        self._waiting += 1
        try:
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting -= 1
            gone.cancel()
        return shared.result() if shared.done() else None

    def _wrapped(self, name: str, future: concurrent.futures.Future[Answer]) -> asyncio.Future[Answer]:
        if name not in self._shared:
            self._shared[name] = asyncio.wrap_future(future)
            self._shared[name].add_done_callback(lambda _: self._shared.pop(name))
        return self._shared[name]


async def _disconnected(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
