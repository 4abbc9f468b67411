"""What a server does besides answering: its folder is looked after while it runs, and its models are saved when it ends."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, final

from ..limits import Limits
from ..operations import Operations
from ..stored.maintenance import Maintenance
from ..stored.shutdown import ShutdownSaver

__all__ = ["Lifespan"]

_logger = logging.getLogger("pullback.service")
_MAINTENANCE_SECONDS: Final = 15.0


@final
class Lifespan:
    """From the start of a server to its end.

    Args:
        operations: of the service.
        limits: sizes and counts.
        folder_lock: keeps other servers out of the folder until the end.
        save_seconds: at the end, models in memory are saved, in so many seconds at most; None: they are let go.
    """

    def __init__(
        self, operations: Operations, limits: Limits, folder_lock: sqlite3.Connection, save_seconds: float | None
    ) -> None:
        self._operations, self._limits, self._lock, self._save_seconds = operations, limits, folder_lock, save_seconds

    @asynccontextmanager
    async def run(self, _: Any) -> AsyncIterator[None]:
        """Look after the folder while the server runs, and end it in order; Starlette enters this context."""
        tasks = [asyncio.create_task(work()) for work in (self._sweep, self._maintain)]
        yield
        for task in tasks:
            task.cancel()
        await self._stop()
        self._operations.journal.close()
        self._lock.close()

    async def _stop(self) -> None:
        """Let what runs come to its end, and save the models if that was asked for."""
        sequencer, seconds = self._operations.sequencer, self._save_seconds
        if seconds is None:
            await asyncio.to_thread(sequencer.close)
            return
        saver = ShutdownSaver(self._operations.models, self._operations.journal, seconds)
        ended, _ = await asyncio.wait([asyncio.create_task(asyncio.to_thread(sequencer.close))], timeout=seconds)
        if ended:
            sentences = await asyncio.to_thread(saver.save_all)
        else:
            sentences = saver.lost(f"an operation did not end within {seconds:g} s")
        for sentence in sentences:
            _logger.warning("%s", sentence)

    async def _sweep(self) -> None:
        """Let go of what is too old even where no request comes any more."""
        while True:
            await asyncio.sleep(self._limits.graph_seconds / 4)
            self._operations.sequencer.run(self._operations.sweep)

    async def _maintain(self) -> None:
        """Look after the folder, beside the event loop."""
        do = self._operations
        bound = self._limits.answer_bytes
        maintenance = Maintenance(do.models.checkpoints, do.journal, do.sessions, do.in_memory, bound)
        while True:
            await asyncio.sleep(_MAINTENANCE_SECONDS)
            try:
                await asyncio.to_thread(maintenance.work)
            except Exception:  # whatever it is, the folder is looked after again the next time
                _logger.exception("the maintenance of the folder failed")
