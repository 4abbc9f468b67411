"""A client of the official SDK closes, whatever its heartbeat is doing."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import tinker
from servers import KEY, SDK_WARNINGS
from tinker.lib import internal_client_holder

from pullback.service.http import client_config

pytestmark = SDK_WARNINGS
CLIENTS = 40  # of which 2 to 6 never closed, each of which told to use the transport that loses cancellations


class Hurried:
    """The asyncio of the SDK's clients, whose heartbeats follow each other at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0.001 if seconds == 10 else seconds)


@pytest.mark.slow
def test_closing_while_a_heartbeat_is_answered(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client's close ends, though its heartbeat is under way almost always."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setattr(internal_client_holder, "asyncio", Hurried())
    closed = []
    for _ in range(CLIENTS):
        client = tinker.ServiceClient(base_url=url, api_key=KEY)
        client.create_sampling_client(base_model="tiny").result()
        time.sleep(0.02)  # so that a heartbeat is under way
        closed.append(client.close("success"))
    for future in closed:
        future.result(timeout=120)


@pytest.mark.parametrize(("python", "pyqwest"), [("3.11.7", False), ("3.12.1", True), ("3.110.0", True), ("", True)])
def test_the_transport_that_loses_cancellations_is_not_for_python_3_11(
    web: Any, url: str, python: str, pyqwest: bool
) -> None:
    """The SDK says on which Python it runs, and is told which transport to use; all else is the same."""
    answer = web(url).post("client/config", headers={"x-stainless-runtime-version": python})
    assert answer.json() == {**client_config._CLIENT, "use_pyqwest_transport": pyqwest}
