"""kill -9 of the service while a client trains: it forgets nothing it promised, and what was lost says so."""

from __future__ import annotations

import gc
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
import torch
from clients.hurried import hurry
from helpers import tiny_llama
from safetensors.torch import load_file
from served.processes import CommandProcess, ServerProcess
from servers import KEY, SDK_WARNINGS, rest, sdk_data
from tiers import SOAK

from pullback.testing.network.faults import Exchange, FaultyProxy, misbehaving

pytestmark = SDK_WARNINGS
MOMENTS = 50 if SOAK else 2
STEPS = 10
SAVE_EVERY = 3
PARAMS = tinker.AdamParams(learning_rate=1e-2)
LAST = re.compile(r"restarted, and what \S+ had in memory is gone; the last durable checkpoint is (tinker://\S+)")
UP_TO = re.compile(r"all up to seq_id (\d+)")
NONE = "there is no durable checkpoint"
AGAIN = "nothing else is lost: ask again"


class Training:
    """A client that trains to the end whatever happens to the service; it follows what the errors say.

    Attributes:
        path, done: the checkpoint to go on from, and how many steps it holds.
        errors: that were met.
    """

    def __init__(self, url: str, names: str) -> None:
        self.url, self.names = url, names
        self.path: str | None = None
        self.done = 0
        self.errors: list[str] = []

    def run(self) -> str:
        """Return where the end is saved."""
        while True:
            try:
                with tinker.ServiceClient(base_url=self.url, api_key=KEY) as service:
                    return self.attempt(service)
            except tinker.APIConnectionError as error:  # nothing was made yet: while there is a model, the SDK asks on
                self.errors.append(str(error))
            except tinker.RequestFailedError as error:
                self.errors.append(str(error))
                self.heed(str(error))

    def attempt(self, service: tinker.ServiceClient) -> str:
        self.steps_at = {0: self.done}  # how many steps a checkpoint holds, by the seq_id of its saving
        if self.path is None:
            client = service.create_lora_training_client("tiny", rank=2, seed=3).result()
        else:
            client = service.create_training_client_from_state_with_optimizer(self.path).result()
        number = 0
        for step in range(self.done, STEPS):
            sent: list[Any] = [client.forward_backward(sdk_data(step), "ppo"), client.optim_step(PARAMS)]
            number += 2
            if (step + 1) % SAVE_EVERY == 0:
                name = "last" if self.names == "one" else f"step-{step + 1}"
                sent.append(client.save_state(name, overwrite=self.names == "one"))
                number += 1
                self.steps_at[number] = step + 1
            for future in sent:
                future.result(timeout=120)
        return str(client.save_state("end").result(timeout=120).path)

    def heed(self, error: str) -> None:
        """Go on from where the error says; a message that does not say is a defect."""
        if AGAIN in error:
            return
        found = LAST.search(error)
        if found is None:
            assert NONE in error, error
            self.path, self.done = None, 0
            return
        up_to = UP_TO.search(error)
        self.path, self.done = found[1], self.steps_at[int(up_to[1]) if up_to else 0]


def files(root: Path, path: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights and optimizer."""
    model, kind, name = path.removeprefix("tinker://").split("/")
    folder = root / model.replace(":", "_") / kind / name
    return {
        f"{file}/{key}": tensor
        for file in ("adapter_model.safetensors", "optimizer.safetensors")
        for key, tensor in load_file(folder / file).items()
    }


def require_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def require_known(http: httpx.Client, exchanges: Sequence[Exchange]) -> int:
    """Everything that a client was told is still so; return how many answers were compared."""
    sessions = set(http.get("sessions", params={"limit": 10_000}).json()["sessions"])
    runs = {one["training_run_id"] for one in http.get("training_runs?limit=10000").json()["training_runs"]}
    saved = {one["tinker_path"] for one in http.get("checkpoints?limit=10000").json()["checkpoints"]}
    compared = 0
    for one in exchanges:
        if one.route == "create_session" and one.status == 200:
            assert json.loads(one.response)["session_id"] in sessions
        if one.route == "retrieve_future" and one.status == 200:
            again = http.post("retrieve_future", json={"request_id": json.loads(one.request)["request_id"]})
            assert again.content == one.response
            compared += 1
            told = json.loads(one.response) if one.response.startswith(b"{") else {}
            if told.get("type") == "create_model":
                assert told["model_id"] in runs
            if told.get("type") == "save_weights":
                assert told["path"] in saved
    return compared


@pytest.fixture(scope="module", autouse=True)
def in_a_hurry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch, 0.05)
        yield
    gc.collect()  # the SDK's sockets


class Killed:
    """A server on a folder behind a proxy: killed after some seconds, checked, and started again."""

    def __init__(self, start: Callable[[], ServerProcess | CommandProcess]) -> None:
        self.start, self.compared = start, 0
        self.server = start()
        self.problems: list[BaseException] = []

    def kill_after(self, seconds: float, proxy: FaultyProxy) -> threading.Thread:
        """Do it in a thread; what goes wrong there is in ``problems``."""

        def act() -> None:
            try:
                time.sleep(seconds)
                self.server.kill()
                before = list(proxy.exchanges)
                self.server = self.start()
                with rest(self.server.url) as http:
                    self.compared += require_known(http, before)
                proxy.upstream = self.server.url
            except BaseException as problem:
                self.problems.append(problem)
                raise

        thread = threading.Thread(target=act)
        thread.start()
        return thread


def killed_and_compared(root: Path, start: Callable[[], ServerProcess | CommandProcess], moments: int) -> str:
    """Kill at random moments of as many trainings; all end alike. Return what happened in words."""
    place, chance = Killed(start), random.Random(0 if moments < 50 else None)
    began = time.perf_counter()
    expected = files(root, Training(place.server.url, "many").run())
    usual, met = time.perf_counter() - began, 0
    for moment in range(moments):
        with misbehaving(place.server.url) as proxy:
            began = time.perf_counter()
            thread = place.kill_after(chance.uniform(0, usual), proxy)
            training = Training(proxy.url, ("one", "many")[moment % 2])
            end = training.run()
            if not training.errors:  # the first training was a cold start; the kill came after the end of this one
                usual = min(usual, time.perf_counter() - began)
            thread.join()
        assert not place.problems
        require_same(files(root, end), expected)
        met += bool(training.errors)
    place.server.kill()
    assert place.compared > 0
    return f"{moments} kills in {usual:.1f} s of training, {met} met by the client, {place.compared} answers kept"


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, capsys: Any) -> None:
    """Killed while it trains, the service comes back knowing what it said; the client ends where it would have ended."""
    words = killed_and_compared(tmp_path, lambda: ServerProcess(tmp_path, poll_seconds=0.5), MOMENTS)
    if MOMENTS >= 50:
        with capsys.disabled():
            print(f"\n{words}")


@pytest.mark.soak
def test_the_command_is_killed(tmp_path: Path) -> None:
    """The same of ``pullback serve`` on a model folder."""
    model, folder = tmp_path / "model", tmp_path / "checkpoints"
    whole: Any = tiny_llama(torch.float32).model
    whole.save_pretrained(model)
    killed_and_compared(folder, lambda: CommandProcess(folder, model, KEY), 3)
