"""A server that is asked to end: what was only in memory is saved under a name that says so, in bounded time, and named."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from served.damage import KEYS, Client, serving_from
from served.processes import CommandProcess
from servers import KEY, MODEL, Direct, finished, gradient_body, new_model, rest, tiny_models

from pullback.backends import AdamParams
from pullback.cli.serve import _at_the_end
from pullback.errors import StorageError
from pullback.service.durability.answers import Failure
from pullback.service.stored import shutdown
from pullback.service.stored.shutdown import ShutdownSaver

SHUTDOWN = re.compile(rf"tinker://{MODEL}/weights/shutdown-\d{{8}}T\d{{6}}Z")


def trained(direct: Direct, number: int) -> int:
    direct.read(direct.gradient(number))
    direct.read(direct.call("optim_step", number + 1))
    return number + 2


def test_what_changed_is_saved_and_named(direct: Direct) -> None:
    """After the restart, the error of the old model names the checkpoint; it holds weights and gradients, bit for bit."""
    number = trained(direct, 1)
    direct.read(direct.call("save_weights", number, path="one"))
    number = trained(direct, number + 1)
    direct.read(direct.gradient(number))
    before = direct.models.backends[MODEL]
    direct.sequencer.close()
    (sentence,) = ShutdownSaver(direct.models, direct.journal, 30.0).save_all()
    uri = sentence.rpartition(" ")[2]
    assert SHUTDOWN.fullmatch(uri)
    again = direct.restart()
    answer = again.read(again.call("optim_step", number + 1))
    assert isinstance(answer, Failure)
    assert f"{uri} (all up to seq_id {number})" in answer.text
    given = {"session_id": "sess", "model_seq_id": 1, "path": uri, "optimizer": True}
    assert again.read(again.operations.load_weights("me", b"", given))["type"] == "load_weights"
    after = again.models.backends["sess:train:1"]
    for (name, p), q in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    step = {"model_id": "sess:train:1", "seq_id": 1, "adam_params": {"learning_rate": 1e-2}}
    stepped = again.read(again.operations.training.optim_step("me", b"", step))["metrics"]
    expected = before.optim_step(AdamParams(learning_rate=1e-2)).result().metrics
    assert stepped["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    again.sequencer.close()


def test_what_is_saved_is_not_saved_again(direct: Direct) -> None:
    """Nor what has not been trained."""
    assert ShutdownSaver(direct.models, direct.journal, 30.0).save_all() == []
    direct.read(direct.call("save_weights", trained(direct, 1), path="one"))
    assert ShutdownSaver(direct.models, direct.journal, 30.0).save_all() == []
    trained(direct, 4)
    assert len(ShutdownSaver(direct.models, direct.journal, 30.0).save_all()) == 1


def second_model(direct: Direct) -> None:
    """Another model of the session, with one gradient."""
    body = {"session_id": "sess", "model_seq_id": 1, "base_model": "tiny", "lora_config": {"rank": 2}}
    direct.read(direct.operations.create_model("me", b"1", body))
    step = {"model_id": "sess:train:1", "seq_id": 1, "adam_params": {"learning_rate": 1e-2}}
    direct.read(direct.operations.training.optim_step("me", b"", step))


@pytest.mark.parametrize(("seconds", "count"), [(19.0, 1), (21.0, 2)])
def test_time_is_bounded(direct: Direct, seconds: float, count: int) -> None:
    """Each saving takes 5 s of this clock: the second begins at 15, and would end at 20."""
    trained(direct, 1)
    second_model(direct)
    ticks = itertools.count(0, 5)
    words = ShutdownSaver(direct.models, direct.journal, seconds, clock=lambda: float(next(ticks))).save_all()
    assert len(words) == 2
    assert sum("is saved as" in sentence for sentence in words) == count
    assert all("is saved as" in s or f"the {seconds:g} s for it have passed" in s for s in words)


def test_a_disk_that_refuses_is_said(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each model, with what is left of it."""
    direct.read(direct.call("save_weights", trained(direct, 1), path="one"))
    trained(direct, 4)

    def refuse(*_: Any) -> str:
        raise StorageError("the server's disk is full")

    monkeypatch.setattr(shutdown, "save", refuse)
    (sentence,) = ShutdownSaver(direct.models, direct.journal, 30.0).save_all()
    assert "is not saved (the server's disk is full)" in sentence
    assert "weights/one (all up to seq_id 3)" in sentence


@pytest.mark.parametrize("seconds", [None, 30.0])
def test_the_lifespan_saves_if_it_was_asked_to(tmp_path: Path, seconds: float | None, caplog: Any) -> None:
    """`serving` does not; the command does."""

    async def used() -> None:
        async with serving_from(tmp_path, tiny_models(tmp_path).base, save_seconds=seconds) as (http, _):
            await Client(http, KEYS[0]).work("crimson", saves=False)

    with caplog.at_level(logging.WARNING):
        asyncio.run(used())
    found = list(tmp_path.glob("*/weights/shutdown-*"))
    assert len(found) == (0 if seconds is None else 1)
    assert ("is saved as tinker://" in caplog.text) == bool(found)


def test_it_says_at_the_start_what_will_be_lost() -> None:
    """Where it was told not to save."""
    assert "are lost" in _at_the_end(None)
    assert "are saved as checkpoints" in _at_the_end(12.0)


@pytest.mark.slow
def test_the_command_saves_on_sigterm(tmp_path: Path) -> None:
    """The next one names the checkpoint to the old client, who goes on from it."""
    model, folder = tmp_path / "model", tmp_path / "checkpoints"
    whole: Any = tiny_llama(torch.float32).model
    whole.save_pretrained(model)
    server = CommandProcess(folder, model, KEY)
    with rest(server.url) as http:
        session, made = new_model(http)
        old = made["model_id"]
        headers = {"content-type": "application/x-protobuf"}
        sent = http.post("forward_backward", content=gradient_body(old, 1, "ppo"), headers=headers)
        finished(http, sent.json()["request_id"])
    server.end(signal.SIGTERM)
    server = CommandProcess(folder, model, KEY)
    with rest(server.url) as http:
        step = {"model_id": old, "seq_id": 2, "adam_params": {"learning_rate": 1e-2}}
        error = finished(http, http.post("optim_step", json=step).json()["request_id"])["error"]
        named = re.search(r"tinker://\S+/weights/shutdown-\S+ \(all up to seq_id 1\)", error)
        assert named, error
        load = {"session_id": session, "model_seq_id": 1, "path": named[0].partition(" ")[0], "optimizer": True}
        loaded = finished(http, http.post("load_weights", json=load).json()["request_id"])
        assert loaded["type"] == "load_weights"
        step = {**step, "model_id": loaded["model_id"], "seq_id": 1}
        assert finished(http, http.post("optim_step", json=step).json()["request_id"])["metrics"]["grad_norm"] > 0
    server.kill()
