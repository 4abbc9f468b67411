"""healthz while others list thousands of models: the event loop waits for nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from served.damage import KEYS, serving_from
from served.journal_rows import rows_of, written
from servers import tiny_models

from pullback.service.durability.database import Database
from pullback.service.durability.journal import Journal
from pullback.service.limits import digest_of

MANY = 5000
LISTINGS = (
    "training_runs?limit=1",
    "training_runs?limit=500",
    "checkpoints?limit=500",
    "sessions",
    "list_checkpoints",
)


def filled(folder: Path, count: int) -> None:
    """Write a journal of so many sessions with their models and checkpoints, whose folders are there."""
    owner = digest_of(KEYS[0])[:32]
    journal = Journal(folder / "journal.sqlite")
    rows = [row for i in range(count) for row in rows_of(i)]
    owned = [tuple(owner if value == "me" else value for value in row) for row in rows if row[0] != "checkpoints"]
    journal.database.write(*[written(*row) for row in owned])
    journal.close()


async def asked(http: httpx.AsyncClient, path: str) -> httpx.Response:
    return await http.get(path, headers={"x-api-key": KEYS[0]})


@pytest.mark.parametrize("path", LISTINGS)
def test_health_is_answered_while_a_listing_waits(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the order of events: a listing whose rows do not come is answered after healthz, and after a new session."""
    order: list[str] = []
    read = Database.rows

    def slow(self: Database, table: str, clause: str, *values: Any, **how: Any) -> Any:
        if how.get("listing"):
            deadline = time.monotonic() + 60.0
            while "session" not in order and time.monotonic() < deadline:
                time.sleep(0.001)
        return read(self, table, clause, *values, **how)

    async def noted(what: str, work: Callable[[], Awaitable[httpx.Response]]) -> None:
        assert (await work()).status_code == 200
        order.append(what)

    async def used() -> None:
        async with serving_from(tmp_path, tiny_models(tmp_path).base) as (http, _):
            monkeypatch.setattr(Database, "rows", slow)
            listing = asyncio.create_task(noted("listing", lambda: asked(http, path)))
            await asyncio.sleep(0)
            await noted("healthz", lambda: asked(http, "healthz"))
            await noted("session", lambda: http.post("create_session", json={}, headers={"x-api-key": KEYS[0]}))
            await listing

    asyncio.run(used())
    assert order == ["healthz", "session", "listing"]


@pytest.mark.soak
def test_health_under_listings(tmp_path: Path, capsys: Any) -> None:
    """Printed: how long healthz takes alone, and while four clients list 5,000 models."""
    filled(tmp_path, MANY)

    async def health(http: httpx.AsyncClient, count: int) -> list[float]:
        took = []
        for _ in range(count):
            began = time.perf_counter()
            await asyncio.sleep(0.001)  # others have their turn: what they take of the loop is what is measured
            assert (await asked(http, "healthz")).status_code == 200
            took.append(time.perf_counter() - began)
        return sorted(took)

    async def lists(http: httpx.AsyncClient) -> int:
        for i in range(20):
            assert (await asked(http, LISTINGS[i % len(LISTINGS)])).status_code == 200
        return 20

    async def used() -> tuple[list[float], list[float], float]:
        async with serving_from(tmp_path, tiny_models(tmp_path).base) as (http, _):
            alone, began = await health(http, 200), time.perf_counter()
            assert (await asked(http, LISTINGS[0])).json()["cursor"]["total_count"] == MANY
            one = time.perf_counter() - began
            listing = [asyncio.create_task(lists(http)) for _ in range(4)]
            loaded: list[float] = []
            while not all(task.done() for task in listing):
                loaded += await health(http, 20)
            return alone, sorted(loaded), one

    alone, loaded, one = asyncio.run(used())
    with capsys.disabled():
        print(
            f"\n{MANY} models: training_runs?limit=1 in {1e3 * one:.1f} ms; healthz alone p50 {1e3 * alone[100]:.1f} ms, "
            f"under four listings p50 {1e3 * loaded[len(loaded) // 2]:.1f} ms, most {1e3 * loaded[-1]:.1f} ms"
        )
