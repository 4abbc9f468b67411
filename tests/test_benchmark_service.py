"""The benchmark of the service measures what it says: everything at once, every answer, and a service that stands still."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import SDK_WARNINGS, tiny_models

from pullback.service import serving

if not (Path(__file__).parent.parent / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)

from benchmarks.serving.load import Measured, at_once, probing, resident
from benchmarks.serving.service import CASES, KEYS, Place, Sizes

pytestmark = SDK_WARNINGS
SIZES = Sizes((1, 2), 2, 2, 6, 2, 12, 3, 2, 3, operations=20, rounds=1)
HELD = 0.15  # seconds


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    models = tiny_models(tmp_path_factory.mktemp("checkpoints"))
    with serving(models, keys=KEYS) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        yield Place(url, os.getpid(), models.base)


ROWS = {
    "clients": {"1 client", "2 clients", "native"},
    "turns": {"a heavy call alone", "a light step alone", "a light step behind them"},
    "rl": {
        f"{s}: {p}" for s in ("native", "service") for p in ("sample", "forward_backward", "optim_step", "whole loop")
    },
    "adapters": {"one after another", "together", "all on one adapter"},
    "healthz": {"idle", "2 clients train"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS)
def test_every_case_reports_ratios_to_its_baseline(case: str, place: Place) -> None:
    """All rows are there, with positive times; the baseline's own ratios are one; the document is JSON."""
    found = json.loads(json.dumps(CASES[case](place, SIZES)))
    assert set(found["rows"]) == ROWS[case]
    for row in found["rows"].values():
        assert 0 < row["p50"] <= row["p95"] <= row["longest"]
    baseline = found["rows"][found["baseline"]]
    assert baseline["rate ratio"] == baseline["p50 ratio"] == baseline["p95 ratio"] == 1.0


@pytest.mark.slow
def test_the_long_run_counts_bytes_and_memory(place: Place) -> None:
    """Longer sequences are more bytes of a request; memory is read at every mark, the last being the last operation."""
    short = CASES["endurance"](place, SIZES)
    long = CASES["endurance"](place, Sizes(length=40, sequences=2, operations=20))
    assert 100 < short["bytes up"] < long["bytes up"]
    assert short["bytes down"] > 0
    assert list(short["memory"]) == [2, 4, 10, 14, 20]
    assert all(size > 1e6 for size in short["memory"].values())
    assert resident(2**22 + 1) == 0, "no such process"


@given(st.integers(1, 6), st.integers(1, 4))
def test_works_run_at_once(count: int, times: int) -> None:
    """Each work waits for all others, every time: one after another, none would end."""
    meeting = threading.Barrier(count, timeout=30)
    found = at_once([lambda: meeting.wait()] * count, times)
    assert len(found.latencies) == count * times
    assert found.rate == pytest.approx(count * times / found.seconds)


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=200), st.integers(1, 99))
def test_percentiles_stay_within_the_latencies(latencies: list[float], percent: int) -> None:
    """No percentile lies beyond the shortest or the longest, and the fiftieth is the median."""
    found = Measured(1.0, latencies)
    assert min(latencies) * (1 - 1e-9) <= found.quantile(percent) <= max(latencies) * (1 + 1e-9)
    below = sum(x < found.quantile(50) * (1 - 1e-9) for x in latencies)
    assert below <= len(latencies) / 2


class _Held(BaseHTTPRequestHandler):
    """Answers the first request at once, and the second one late."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        if type(self).asked == 2:
            time.sleep(HELD)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_service_that_stands_still_is_seen() -> None:
    """One late answer among many is in the list, and no other request was asked meanwhile."""
    with HTTPServer(("127.0.0.1", 0), _Held) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with probing(f"http://127.0.0.1:{server.server_address[1]}", KEYS[0]) as latencies:
            while _Held.asked < 4:
                time.sleep(0.01)
        server.shutdown()
        thread.join()
    assert max(latencies) >= HELD
    assert len(latencies) == _Held.asked
