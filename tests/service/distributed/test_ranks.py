"""A service of two processes trains as one process does, and a failure of the second one is everybody's, in words."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served.ranked_service import DISK, RankedService, asked, gradient, one_process, ranked, trained
from served.service_rank import KILLED_TOKENS, NO_MEMORY_RANK, REFUSED_TOKENS, SKIPPED_RANK, SKIPPED_RATE
from servers import KEY, SDK_WARNINGS, finished, new_model, rest

from pullback.service import serving

pytestmark = [
    *SDK_WARNINGS,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
GOOD = gradient([3, 4, 5, 6], [2, 4, 5], [7, 2])
STEP = {"adam_params": {"learning_rate": 1e-2}}
EXACT = 1e-10  # fp64; log-probs and inputs go over the wire in fp32
WIRE = 1e-6
SOON = 15.0  # seconds that processes wait for each other: more than a call takes on a busy machine
WAITED = 300.0
AGAIN = "this server has lost one of its processes, .* so the server must be started again"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankedService]:
    with pytest.MonkeyPatch.context() as patch, ranked(tmp_path_factory.mktemp("two")) as service:
        patch.setenv("TINKER_TELEMETRY", "0")
        yield service


@pytest.fixture
def ending(tmp_path: Path) -> Iterator[RankedService]:
    """Processes that a test may end: the order in which tests run is not that of this file on several workers."""
    with ranked(tmp_path / "ending") as service:
        yield service


def test_the_numbers_of_one_process(two: RankedService, tmp_path: Path) -> None:
    """Two adapters, built-in and custom losses, a load in between: log-probs, metrics, weights and moments are the same."""
    models = one_process(tmp_path)
    with serving(models, keys=[KEY]) as url:
        numbers, saved = trained(url, models.checkpoints.root)
    found, theirs = trained(two.url, two.root)
    assert found == pytest.approx(numbers, rel=WIRE, abs=WIRE)
    assert theirs.keys() == saved.keys()
    for name, tensor in saved.items():
        same = theirs[name].reshape(tensor.shape)  # several processes write a number as one row
        torch.testing.assert_close(same, tensor, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (NO_MEMORY_RANK, "failed on rank 1 .nothing has changed on any rank.: OutOfMemoryError: planted"),
        (SKIPPED_RANK, "rank 0 is at 'TorchBackend: .*, rank 1 at 'create of .*: conclusion'"),
    ],
    ids=["no memory", "skipped"],
)
def test_a_model_is_made_on_all_processes_or_on_none(rank: int, words: str, two: RankedService) -> None:
    """What the second process cannot make, or does not, is refused in words; the next model is made and trained."""
    with rest(two.url) as http:
        session, refused = new_model(http, rank=rank)
        assert refused["category"] == "server"
        assert re.search(words, refused["error"]), refused
        missing = http.post("forward_backward", json={"model_id": f"{session}:train:0", "seq_id": 1, **GOOD})
        assert missing.status_code == 404
        _, made = new_model(http)
        assert asked(http, made["model_id"], "forward_backward", 1, **GOOD)["metrics"]["tokens:sum"] == 9


def test_a_skipped_step_is_noticed_and_not_half_made(two: RankedService) -> None:
    """No process has made it: the next step, with the gradient that is still there, is that of a model without it."""
    with rest(two.url) as http:
        norms = []
        for skipped in (True, False):
            _, made = new_model(http, seed=7)
            asked(http, made["model_id"], "forward_backward", 1, **GOOD)
            if skipped:
                refused = asked(http, made["model_id"], "optim_step", 2, adam_params={"learning_rate": SKIPPED_RATE})
                assert "has ended otherwise on rank 1 than on rank 0" in refused["error"]
                assert refused["category"] == "server"
            first = asked(http, made["model_id"], "optim_step", 2 + skipped, **STEP)
            asked(http, made["model_id"], "forward_backward", 3 + skipped, **GOOD)
            second = asked(http, made["model_id"], "optim_step", 4 + skipped, **STEP)
            norms.append((first["metrics"]["grad_norm"], second["metrics"]["grad_norm"]))
        assert norms[0] == pytest.approx(norms[1], rel=EXACT)


def test_a_save_that_finds_no_room_is_refused_everywhere(two: RankedService) -> None:
    """It is counted by all processes, between a gradient and its step; both go on, and the next save has room."""
    with rest(two.url) as http:
        _, made = new_model(http)
        model = made["model_id"]
        half_trained(http, model)
        full = asked(http, model, "save_weights", 4, path="full", user_metadata={"text": "x" * DISK})
        assert "bytes of checkpoints" in full["error"]
        assert asked(http, model, "optim_step", 5, **STEP)["metrics"]["grad_norm"] > 0
        assert "metrics" in asked(http, model, "forward_backward", 6, **GOOD)
        assert asked(http, model, "save_weights", 7, path="full")["path"]


def test_a_load_that_fails_has_changed_nothing(two: RankedService) -> None:
    """On any process: the next steps are those of a model that was not asked to load."""
    with rest(two.url) as http:
        norms = []
        for asked_for in (True, False):
            _, made = new_model(http, seed=7)
            model = made["model_id"]
            half_trained(http, model)
            path = asked(http, model, "save_weights", 4, path="whole")["path"]
            if asked_for:
                (folder,) = two.root.glob(f"{model.replace(':', '_')}/weights/whole")
                (folder / "optimizer.safetensors").unlink()
                refused = asked(http, model, "load_weights", 5, path=path, optimizer=True)
                assert "optimizer.safetensors" in refused["error"]
            first = asked(http, model, "optim_step", 5 + asked_for, **STEP)
            asked(http, model, "forward_backward", 6 + asked_for, **GOOD)
            second = asked(http, model, "optim_step", 7 + asked_for, **STEP)
            norms.append((first["metrics"]["grad_norm"], second["metrics"]["grad_norm"]))
        assert norms[0] == pytest.approx(norms[1], rel=EXACT)


def test_a_mistake_of_the_client_is_not_the_servers(two: RankedService) -> None:
    """Every process refuses it; the first one's words are the answer, and training goes on."""
    with rest(two.url) as http:
        _, made = new_model(http)
        refused = asked(http, made["model_id"], "forward_backward", 1, **gradient([3, 4], [2, 10**6]))
        assert refused["category"] == "user"
        assert "datum 1" in refused["error"]
        assert "rank" not in refused["error"]
        assert "metrics" in asked(http, made["model_id"], "forward_backward", 2, **GOOD)


def test_a_mistake_in_the_share_of_another_process_is_the_clients_too(two: RankedService) -> None:
    """What the second process refuses in its share is refused in its words, as one process does; training goes on."""
    with rest(two.url) as http:
        _, made = new_model(http)
        refused = asked(http, made["model_id"], "forward_backward", 1, **gradient(REFUSED_TOKENS, [2, 4]))
        assert refused == {"error": "the gradient of datum 1 is not finite", "category": "user"}
        assert "metrics" in asked(http, made["model_id"], "forward_backward", 2, **GOOD)


def test_an_export_that_only_its_reader_reads(two: RankedService, tmp_path: Path) -> None:
    """All processes write the weights, and the first one encrypts them: what its reader opens is what a checkpoint holds."""
    pyrage = pytest.importorskip("pyrage", reason="exports are encrypted by pyrage (extra serve)")
    reader = pyrage.x25519.Identity.generate()
    with rest(two.url) as http:
        _, made = new_model(http)
        model = made["model_id"]
        asked(http, model, "forward_backward", 1, **GOOD)
        asked(http, model, "optim_step", 2, **STEP)
        for number, route, name, extra in (
            (3, "save_weights", "open", {}),
            (4, "save_weights_external", "shut", {"age_encryption_recipients": [str(reader.to_public())]}),
        ):
            assert asked(http, model, route, number, path=name, **extra)["path"].endswith(f"/{name}")
    places = [path for path in two.root.rglob("adapter_model.safetensors*") if model.replace(":", "_") in str(path)]
    shut, whole = sorted(places, key=lambda path: path.suffix)
    opened = tmp_path / "adapter_model.safetensors"
    opened.write_bytes(pyrage.decrypt(shut.read_bytes(), [reader]))
    assert opened.read_bytes() == whole.read_bytes()


def test_a_killed_process_fails_the_operation_and_what_follows(tmp_path: Path) -> None:
    """The words say that the server must be started again; the checkpoint from before is whole, and loads on one process."""
    with ranked(tmp_path) as service, rest(service.url) as http:
        session, made = new_model(http, seed=7)
        model = made["model_id"]
        asked(http, model, "forward_backward", 1, **GOOD)
        asked(http, model, "optim_step", 2, **STEP)
        path = asked(http, model, "save_weights", 3, path="whole")["path"]
        assert http.get("healthz").json() == {"status": "ok"}
        lost = asked(http, model, "forward_backward", 4, **gradient(KILLED_TOKENS, [2, 4]))
        after = [
            asked(http, model, "optim_step", 5, **STEP),
            asked(http, model, "save_weights", 6, path="none"),
            new_model(http)[1],
        ]
        for refused in (lost, *after):
            assert re.search(AGAIN, refused["error"])
            assert refused["category"] == "server"
        health = http.get("healthz")
        assert health.status_code == 503, "what looks after the server may start it again"
        assert re.search(AGAIN, health.json()["detail"])
        assert [one["tinker_path"] for one in http.get("checkpoints").json()["checkpoints"]] == [path]
        assert http.post(f"sessions/{session}/finish").status_code == 204, "what is left of the server still answers"
        assert service.end()[1] == -signal.SIGKILL
    models = one_process(tmp_path)
    models.checkpoints.root = service.root
    with serving(models) as url, rest(url) as http:
        _, made = new_model(http)
        assert asked(http, made["model_id"], "load_weights", 1, path=path, optimizer=True)["path"] == path
        assert "metrics" in asked(http, made["model_id"], "forward_backward", 2, **GOOD)


def test_a_process_that_takes_no_call_is_lost_and_one_that_waits_long_for_it_is_not(tmp_path: Path) -> None:
    """Between two calls as in one: what looks after the server reads so, and rank 0 ends though nobody hears of it."""
    with ranked(tmp_path, timeout=SOON) as service, rest(service.url) as http:
        _, made = new_model(http)
        asked(http, made["model_id"], "forward_backward", 1, **GOOD)
        time.sleep(SOON + 1)  # with nothing to do
        assert "metrics" in asked(http, made["model_id"], "forward_backward", 2, **GOOD)
        service.processes[1].send_signal(signal.SIGSTOP)
        sent = http.post("optim_step", json={"model_id": made["model_id"], "seq_id": 3, **STEP}).json()["request_id"]
        deadline = time.monotonic() + WAITED
        while http.get("healthz").status_code != 503:
            assert time.monotonic() < deadline, "rank 0 waits for ever"
            time.sleep(0.1)
        lost = finished(http, sent)
        assert re.search(AGAIN, lost["error"])
        assert lost["category"] == "server"
        service.processes[0].terminate()
        assert service.processes[0].wait(timeout=WAITED) == 128 + signal.SIGTERM


def test_what_is_in_memory_is_saved_when_they_are_asked_to_end(ending: RankedService, tmp_path: Path) -> None:
    """Asked to end as torchrun asks, rank 0 ends by the signal, and rank 1 without an error; one process goes on from there.

    Weights, moments and the accumulated gradient are those of a model that was never interrupted.
    """
    models, norms = one_process(tmp_path), []
    with rest(ending.url) as http:
        _, made = new_model(http, seed=7)
        left = made["model_id"]
        half_trained(http, left)
        assert ending.end(everyone=True) == [128 + signal.SIGTERM, 0]
    models.checkpoints.root = ending.root
    with serving(models) as url, rest(url) as http:
        session, made = new_model(http, seed=7)
        half_trained(http, made["model_id"])
        (saved,) = http.get(f"training_runs/{left}/checkpoints").json()["checkpoints"]
        assert re.fullmatch(rf"tinker://{left}/weights/shutdown-\d{{8}}T\d{{6}}Z", saved["tinker_path"])
        given = {"session_id": session, "model_seq_id": 1, "path": saved["tinker_path"], "optimizer": True}
        again = finished(http, http.post("load_weights", json=given).json()["request_id"])
        for model, number in ((made["model_id"], 4), (again["model_id"], 1)):
            first = asked(http, model, "optim_step", number, **STEP)
            asked(http, model, "forward_backward", number + 1, **GOOD)
            second = asked(http, model, "optim_step", number + 2, **STEP)
            norms.append([first["metrics"]["grad_norm"], second["metrics"]["grad_norm"]])
    assert norms[0] == pytest.approx(norms[1], rel=EXACT)


def half_trained(http: Any, model: str) -> None:
    """A step, and a gradient that no step has used."""
    asked(http, model, "forward_backward", 1, **GOOD)
    asked(http, model, "optim_step", 2, **STEP)
    asked(http, model, "forward_backward", 3, **gradient([3, 3, 5], [4, 1]))
