"""Greedy requests of one key beside the light ones of another: the memory and the turns that they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients.bodies import JSON, PROTOBUF
from clients.graphs import loss_body
from clients.planted_graphs import PLANTED
from servers import SDK_WARNINGS, finished, json_datum, new_model, rest

pytestmark = [*SDK_WARNINGS, pytest.mark.soak]
MOST_BYTES = 100_000_000
LARGE: dict[str, tuple[bytes, dict[str, str]]] = {
    "a million empty datums": (b"\x1a\x00" * 1_000_000, PROTOBUF),
    "sixty megabytes of objects": (b"[" + b"{}," * 20_000_000 + b"{}]", JSON),
    "sixty megabytes of brackets": (b"[" * 60_000_000, JSON),
}


class Service:
    """Its address, and the most memory that it has had."""

    def __init__(self, url: str, process: int) -> None:
        self.url, self._process = url, process

    @property
    def peak(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self._process}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    command = [sys.executable, "-m", "clients.planted_requests", str(tmp_path_factory.mktemp("greedy"))]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=paths) as process:
        assert process.stdout is not None
        url, number = process.stdout.readline().split()
        yield Service(url, int(number))
        process.communicate("")
    assert process.returncode == 0


class Light:
    """Somebody who asks again and again whether the service is there."""

    def __init__(self, url: str) -> None:
        self._url, self._begun, self._ended = url, threading.Event(), threading.Event()
        self.waits: list[float] = []
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        with rest(self._url, "tml-light") as http:
            while not self._ended.is_set():
                began = time.perf_counter()
                assert http.get("healthz").status_code == 200
                self.waits.append(time.perf_counter() - began)
                self._begun.set()

    def __enter__(self) -> Light:
        self._thread.start()
        assert self._begun.wait(120)
        self.waits.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def longest(self) -> float:
        """Seconds; the last answer has come."""
        return max(self.waits)


def warmed(service: Service, http: Any, model: str) -> int:
    """Run each kind of request once, so that what is imported then does not count; return the next number."""
    for number in (1, 2):
        inner: dict[str, Any] = {"data": [json_datum([1, 2, 3])], "loss_fn": "cross_entropy"}
        sent = {"model_id": model, "seq_id": number, "forward_backward_input": inner}
        assert "error" not in finished(http, http.post("forward_backward", json=sent).json()["request_id"])
    return 3


def test_small_graphs_take_neither_memory_nor_time(service: Service, capsys: Any) -> None:
    """Every planted graph, created and run through HTTP by a request of 10 kB, fails as the sender's mistake."""
    with rest(service.url, "tml-greedy") as http:
        session, made = new_model(http)
        number = warmed(service, http, made["model_id"])
        before, rows = service.peak, []
        for i, (case, nodes) in enumerate(PLANTED.items()):
            body = {"session_id": session, "custom_loss_seq_id": i, **loss_body(*nodes)}
            created = finished(http, http.post("create_custom_loss", json=body).json()["request_id"])
            inner: dict[str, Any] = {"data": [json_datum([1] * 100)], "loss_fn": "custom"}
            inner["loss_fn_config"] = {"loss_id": created["loss_id"]}
            sent = {"model_id": made["model_id"], "seq_id": number + i, "forward_backward_input": inner}
            began = time.perf_counter()
            with Light(service.url) as light:
                answer = finished(http, http.post("forward_backward", json=sent).json()["request_id"])
            rows.append((time.perf_counter() - began, light.longest(), case))
            assert answer.get("category") == "user", (case, answer)
        assert service.peak - before < MOST_BYTES
    with capsys.disabled():
        print(f"\n{len(rows)} graphs: {(service.peak - before) / 1e6:.1f} MB; slowest (s, healthz s): {max(rows)}")


@pytest.mark.parametrize("case", LARGE)
def test_large_bodies_take_their_own_bytes(service: Service, case: str, capsys: Any) -> None:
    """Refused in the memory of the body as it arrives and is put together, and of nothing that it would become."""
    body, headers = LARGE[case]
    with rest(service.url, "tml-greedy") as http:
        warmed(service, http, new_model(http)[1]["model_id"])
        with Light(service.url) as idle:
            time.sleep(1)
        before, began = service.peak, time.perf_counter()
        with Light(service.url) as light:
            answer = http.post("forward_backward", content=body, headers=headers)
        assert answer.status_code == 413, answer.text
        assert service.peak - before < 2.5 * len(body) + 20_000_000
    with capsys.disabled():
        took = time.perf_counter() - began
        waits = f"healthz at most {light.longest():.3f} s, idle {idle.longest():.3f} s"
        print(f"\n{case}: {(service.peak - before) / 1e6:.1f} MB, {took:.2f} s, {waits}")
    assert json.loads(answer.text)["detail"]
