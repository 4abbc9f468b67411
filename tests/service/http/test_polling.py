"""Requests that wait for a result: woken by it, and let go of as soon as their client has gone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import KEY, finished, new_model, tiny_models

from pullback.service import serving
from pullback.service.durability.answers import Answer
from pullback.service.http.polling import LongPolls
from pullback.service.limits import Limits


class Request:
    """An HTTP request whose client can go."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def polled(clients: int, leave: int, *, ends: bool, seconds: float = 3600.0) -> tuple[list[Answer | None], int, int]:
    """Poll one operation, let some clients go, perhaps end it; return answers, what is left there, and what waits still."""

    async def run() -> tuple[list[Answer | None], int, int]:
        polls, future = LongPolls(), concurrent.futures.Future[Answer]()
        requests = [Request() for _ in range(clients)]
        waiting = [asyncio.create_task(polls.answer(request, "req-1", future, seconds)) for request in requests]
        await asyncio.sleep(0)
        assert len(polls) == clients
        for request in requests[:leave]:
            request.gone.set()
        await asyncio.gather(*waiting[:leave])
        if ends:
            assert not any(task.done() for task in waiting[leave:])
            future.set_result({"done": True})
        answers = await asyncio.gather(*waiting)
        await asyncio.sleep(0)
        left = sum(len(shared._callbacks or ()) for shared in polls._shared.values())
        return answers, left, len(polls)

    return asyncio.run(run())


@pytest.mark.parametrize("leave", [0, 7, 200])
def test_who_stays_is_answered(leave: int) -> None:
    """Those who have gone get nothing, all others the answer; nothing is left of either."""
    answers, left, waiting = polled(200, leave, ends=True)
    assert answers == [None] * leave + [{"done": True}] * (200 - leave)
    assert (left, waiting) == (0, 0)


def test_an_operation_that_does_not_end_collects_no_waiters() -> None:
    """However many have polled and gone, or waited in vain, there is left at it what one leaves."""
    one = polled(1, 1, ends=False)[1:]
    for leave, seconds in ((500, 3600.0), (0, 0.01)):
        answers, *left = polled(500, leave, ends=False, seconds=seconds)
        assert answers == [None] * 500
        assert tuple(left) == one
    assert one[1] == 0


def waiting_polls(http: httpx.Client) -> int:
    """The gauge."""
    text = http.get(str(http.base_url.copy_with(path="/metrics"))).text
    found = re.search(r"^pullback_polls (\S+)", text, re.MULTILINE)
    assert found is not None
    return round(float(found[1]))


def test_a_disconnected_client_frees_its_request(web: Any, tmp_path: Path) -> None:
    """Over sockets: polls that would wait for an hour are gone when their clients are; the answer is there for the next."""
    with serving(tiny_models(tmp_path), keys=[KEY], limits=Limits(gap_seconds=3600.0, poll_seconds=3600.0)) as url:
        http = web(url)
        _, made = new_model(http)
        step = {"model_id": made["model_id"], "adam_params": {"learning_rate": 1e-2}}
        pending = http.post("optim_step", json={**step, "seq_id": 2}).json()["request_id"]  # 1 has not come
        for _ in range(5):
            with pytest.raises(httpx.ReadTimeout):
                http.post("retrieve_future", json={"request_id": pending}, timeout=httpx.Timeout(30, read=0.2))
        for _ in range(1000):  # each is a request of its own, in which the server sees who has gone
            if not waiting_polls(http):
                break
        assert waiting_polls(http) == 0
        http.post("optim_step", json={**step, "seq_id": 1})
        assert "metrics" in finished(http, pending)
