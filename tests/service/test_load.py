"""Many clients at once: nothing is lost or doubled, nobody's training is another's, and memory does not grow."""

from __future__ import annotations

import gc
import os
import random
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from safetensors.torch import load_file
from served.processes import ServerProcess
from servers import KEY, SDK_WARNINGS, sdk_data
from tiers import SOAK

pytestmark = SDK_WARNINGS
MODELS = 8
THREADS = 32
EACH = 63 if SOAK else 3
GROWTH = 32 * 1024 * 1024  # bytes that the server may grow by after a quarter of the work
PARAMS = tinker.AdamParams(learning_rate=1e-2)
Act = tuple[str, int]


class Model:
    """A training client that several threads share; what was asked of it, in the order of its numbers."""

    def __init__(self, service: tinker.ServiceClient, seed: int) -> None:
        self.client = service.create_lora_training_client("tiny", rank=2, seed=seed).result()
        self.seed, self.lock = seed, threading.Lock()
        self.asked: list[Act] = []
        self.answers: dict[int, Any] = {}

    def act(self, act: Act) -> None:
        """Send and wait."""
        with self.lock:  # so that the order of the log is the order of the numbers
            place = len(self.asked)
            self.asked.append(act)
            future = self._send(*act)
        self.answers[place] = _plain(future.result(timeout=300))

    def repeat(self, asked: list[Act]) -> None:
        """Send it all, then wait."""
        futures = [self._send(*act) for act in asked]
        self.answers = {place: _plain(future.result(timeout=300)) for place, future in enumerate(futures)}

    def _send(self, verb: str, seed: int) -> Any:
        if verb == "step":
            return self.client.optim_step(PARAMS)
        send = self.client.forward if verb == "look" else self.client.forward_backward
        return send(sdk_data(seed), "ppo")

    def end(self, folder: Path) -> dict[str, torch.Tensor]:
        """Save and read what was saved."""
        path = self.client.save_state("end").result(timeout=300).path
        place = folder / self.client.model_id.replace(":", "_") / "weights" / path.rsplit("/", 1)[1]
        return dict(load_file(place / "adapter_model.safetensors"))


def _plain(result: Any) -> Any:
    if hasattr(result, "loss_fn_outputs"):
        return [one["logprobs"].data for one in result.loss_fn_outputs], result.metrics
    return result.metrics


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worked(model: Model, thread: int, count: int) -> None:
    """What one thread asks for."""
    chance = random.Random(1000 * thread + count)
    for _ in range(count):
        model.act((chance.choice(["gradient", "gradient", "gradient", "look", "step"]), chance.randrange(4)))


def burdened(models: list[Model], count: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(worked, models[i % MODELS], i, count) for i in range(THREADS)]:
            done.result()


def journalled(folder: Path, model: Model) -> list[tuple[int, str, str]]:
    """Number, kind and form of the answer of all operations that the service has accepted for a model."""
    with sqlite3.connect(folder / "journal.sqlite") as journal:
        query = "SELECT number, kind, form FROM operations WHERE line = ? ORDER BY number"
        found = journal.execute(query, [model.client.model_id]).fetchall()
    journal.close()
    return found


KINDS = {"step": "optim_step", "look": "forward", "gradient": "forward_backward"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the server's memory from /proc")
def test_many_clients_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """32 threads on 8 models: every number once, each answer and the end as when alone, bit for bit; memory is flat."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    server = ServerProcess(tmp_path)
    with ExitStack() as stack:
        services = [stack.enter_context(tinker.ServiceClient(base_url=server.url, api_key=KEY)) for _ in range(4)]
        models = [Model(services[i % 4], seed=i) for i in range(MODELS)]
        burdened(models, EACH // 4)
        warm = resident(server.pid)
        burdened(models, EACH - EACH // 4)
        grown = resident(server.pid) - warm
        for model in models:
            kinds = [(n, KINDS[verb]) for n, (verb, _) in enumerate(model.asked, 1)]
            found = journalled(tmp_path, model)
            assert [(number, kind) for number, kind, _ in found] == kinds
            assert all(form in ("protobuf", "json") for _, _, form in found)
            alone = Model(services[0], model.seed)
            alone.repeat(model.asked)
            assert alone.answers == model.answers
            mine, theirs = model.end(tmp_path), alone.end(tmp_path)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    server.kill()
    gc.collect()  # the SDK's sockets
    if SOAK:
        assert grown < GROWTH, grown
        with capsys.disabled():
            count = sum(len(model.asked) for model in models)
            print(
                f"\n{count} operations of {THREADS} threads on {MODELS} models; {warm / 1e6:.1f} MB, then {grown / 1e6:+.1f}"
            )
