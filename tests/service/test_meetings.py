"""Where two features of the service meet: the end of a server and waiting work, sweeps and saves, copies and models."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import MODEL, Direct, copies, finished, new_model, tiny_models

from pullback.backends import TorchBackend
from pullback.service import serving
from pullback.service.durability.journal import Journal
from pullback.service.durability.recovery import sweep
from pullback.service.limits import Limits
from pullback.service.served.registry import ServedModels
from pullback.service.stored.copies import Copies
from pullback.service.stored.shutdown import ShutdownSaver


def beside(work: Callable[[], Any]) -> None:
    """Run work in a thread of its own, and wait for it as long as it waits for nobody."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.2)


def test_the_checkpoint_at_the_end_holds_what_was_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that runs while the server ends, with a save behind it: its answer is kept, and the checkpoint counts it."""
    first = Direct(tmp_path)
    first.start()
    began, go, step = threading.Event(), threading.Event(), TorchBackend.optim_step

    def slow(self: TorchBackend, *given: Any) -> Any:
        done = step(self, *given)
        began.set()
        assert go.wait(120)
        return done

    monkeypatch.setattr(TorchBackend, "optim_step", slow)
    first.read(first.gradient(1, "cross_entropy"))
    running, waiting = first.call("optim_step", 2), first.call("save_weights", 3, path="later")
    assert began.wait(120)
    closing = threading.Thread(target=first.sequencer.close)
    closing.start()
    while not first.sequencer._closed:
        time.sleep(0.001)
    go.set()
    closing.join()
    ShutdownSaver(first.models, first.journal, 30).save_all()
    saved = first.journal.newest_checkpoint(MODEL, "weights")
    assert saved is not None
    assert saved["number"] == 2
    first.journal.close()
    second = Direct(tmp_path)
    assert "metrics" in second.read(running)
    assert saved["uri"] in second.read(waiting).text
    second.sequencer.close()


@pytest.mark.parametrize("where", ["when it has its place", "before it is noted"])
def test_a_sweep_leaves_the_new_checkpoint(where: str, direct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save overwrites a checkpoint whose time to live has passed, and a sweep comes between."""
    now = [time.time()]
    direct.models.checkpoints.clock = lambda: now[0]
    direct.read(direct.call("save_weights", 1, path="a", ttl_seconds=3600))
    now[0] += 4000
    save, note = ServedModels.save, Journal.add_checkpoint

    def swept() -> None:
        beside(lambda: sweep(direct.models.checkpoints, direct.journal))

    def saved(self: ServedModels, *given: Any) -> str:
        path = save(self, *given)
        swept()
        return path

    def noted(self: Journal, *given: Any, **options: Any) -> None:
        swept()
        note(self, *given, **options)

    if where == "before it is noted":
        monkeypatch.setattr(Journal, "add_checkpoint", noted)
    else:
        monkeypatch.setattr(ServedModels, "save", saved)
    path = direct.read(direct.call("save_weights", 2, path="a", overwrite=True))["path"]
    assert direct.models.checkpoints.locate(path).is_dir()
    assert direct.journal.checkpoint(path)["number"] == 2


def test_two_sweeps_at_once(direct: Any) -> None:
    """Each expired checkpoint goes once, and neither sweep fails."""
    for number in range(1, 6):
        direct.read(direct.call("save_weights", number, path=f"c{number}", ttl_seconds=3600))
    direct.models.checkpoints.clock = lambda: time.time() + 4000
    failures: list[BaseException] = []

    def swept() -> None:
        try:
            sweep(direct.models.checkpoints, direct.journal)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=swept) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not direct.journal.checkpoints("me")
    assert not list(direct.models.checkpoints.root.glob("*/weights/*"))


def test_a_model_whose_row_cannot_be_written_is_let_go(web: Any, tmp_path: Path) -> None:
    """Metadata with NaN, or half a character: the creation fails, and nothing stays in memory."""
    models = tiny_models(tmp_path)
    with serving(models, limits=Limits(models=2)) as url:
        http = web(url)
        session = http.post("create_session", json={}).json()["session_id"]
        body = {"session_id": session, "base_model": "tiny", "lora_config": {"rank": 2}}
        for number, bad in enumerate(['{"x": NaN}', r'{"x": "\ud800"}']):
            raw = json.dumps({**body, "model_seq_id": number, "user_metadata": "?"}).replace('"?"', bad)
            answer = finished(http, http.post("create_model", content=raw).json()["request_id"])
            assert answer["category"] == "user"
            assert "metadata must be JSON" in answer["error"]
            assert not models.backends
        assert http.get("training_runs").json()["training_runs"] == []


def test_a_copy_and_a_model_do_not_share_a_number(web: Any, url: str) -> None:
    """Whichever comes second is refused, and the first works on."""
    http = web(url)
    session, made = new_model(http)
    save = {"model_id": made["model_id"], "seq_id": 1, "path": "a"}
    path = finished(http, http.post("save_weights", json=save).json()["request_id"])["path"]
    body = {"session_id": session, "model_seq_id": 7, "base_model": "tiny"}
    live = finished(http, http.post("create_model", json={**body, "path": path}).json()["request_id"])
    copy = {"source_path": path, "session_id": session}
    refused = http.post("copy_weights", json={**copy, "model_seq_id": 7})
    assert refused.status_code == 400
    assert "another model_seq_id" in refused.json()["detail"]
    later = {"model_id": live["model_id"], "seq_id": 1, "path": "b"}
    assert "path" in finished(http, http.post("save_weights", json=later).json()["request_id"])
    assert "tinker_path" in http.post("copy_weights", json={**copy, "model_seq_id": 9}).json()
    stillborn = {**body, "model_seq_id": 9, "lora_config": {"rank": 2}}
    answer = finished(http, http.post("create_model", json=stillborn).json()["request_id"])
    assert "holds a copy" in answer["error"]


def test_a_copy_that_was_never_noted_is_made_again(direct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends between the copy's taking its place and the note of it; the same request succeeds."""
    source = direct.read(direct.call("save_weights", 1, path="a"))["path"]
    body = {"source_path": source, "destination_project_id": "p"}

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Copies, "_note", ended)
        with pytest.raises(KeyboardInterrupt):
            copies(direct).copy("me", body, "key")
    path = copies(direct).copy("me", body, "key")["tinker_path"]
    assert direct.journal.checkpoint(path)["bytes"] == direct.models.checkpoints.size(path)
    assert copies(direct).copy("me", body, "key")["tinker_path"] == path


def test_a_finished_session_stays_finished(web: Any, tmp_path: Path) -> None:
    """What is asked of it fails after a restart too."""
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    with serving(tiny_models(tmp_path)) as url:
        http = web(url)
        session, _ = new_model(http)
        sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
        name = http.post("create_sampling_session", json=sampler).json()["sampling_session_id"]
        http.post(f"sessions/{session}/finish")
    sample = {"sampling_session_id": name, "prompt": prompt, "num_samples": 1, "sampling_params": {"max_tokens": 2}}
    create = {"session_id": session, "model_seq_id": 6, "base_model": "tiny", "lora_config": {"rank": 2}}
    with serving(tiny_models(tmp_path)) as url:
        http = web(url)
        for route, body in (("asample", sample), ("create_model", create)):
            answer = finished(http, http.post(route, json=body).json()["request_id"])
            assert "was finished by its client" in answer["error"]


def test_waiting_prompts_count_among_the_bodies(web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bytes are held until their turn has come, and given back then."""
    models = tiny_models(tmp_path)
    with serving(models) as url:
        http = web(url)
        session, made_model = new_model(http)
        sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
        name = http.post("create_sampling_session", json=sampler).json()["sampling_session_id"]
        held, go = threading.Event(), threading.Event()
        save = models.save

        def slow(*given: Any) -> str:
            held.set()
            assert go.wait(120)
            return save(*given)

        monkeypatch.setattr(models, "save", slow)
        body = {"model_id": made_model["model_id"], "seq_id": 1, "path": "a"}
        running = http.post("save_weights", json=body).json()["request_id"]
        assert held.wait(120)
        prompt = {"chunks": [{"type": "encoded_text", "tokens": torch.ones(30, dtype=torch.int64).tolist()}]}
        sample = {"sampling_session_id": name, "prompt": prompt, "num_samples": 1, "sampling_params": {"max_tokens": 1}}
        size = len(json.dumps(sample))
        waiting = http.post("asample", json=sample).json()["request_id"]
        assert gauge(http, url) >= size // 2
        go.set()
        for request in (running, waiting):
            finished(http, request)
        deadline = time.monotonic() + 60
        while gauge(http, url) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gauge(http, url) == 0


def gauge(http: Any, url: str) -> float:
    lines = http.get(f"{url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("pullback_body_bytes ")).split()[1])
