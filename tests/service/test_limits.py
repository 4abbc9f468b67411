"""Who is let in, what one client can reach, how much he may ask for, and what bad bodies do (nothing)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import zstandard
from served.gaps import Gaps
from servers import KEY, SDK_WARNINGS, finished, new_model, tiny_models

import pullback
from pullback.cli import main
from pullback.errors import CheckpointError, ConfigError
from pullback.service import ServedModels, serving
from pullback.service.http.server import serve_forever
from pullback.service.limits import Keys, Limits, digest_of

pytestmark = SDK_WARNINGS
OTHER = "tml-other"
SMALL = Limits(body_bytes=20_000, datums=3, tokens=50, models=1, rank=8, large_bytes=9)
PROTOBUF = {"content-type": "application/x-protobuf"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with two keys and small limits."""
    with serving(tiny_models(tmp_path_factory.mktemp("two")), keys=[KEY, OTHER], limits=SMALL) as address:
        yield address


def test_keys_and_addresses(web: Any, url: str, models: ServedModels, tmp_path: Any, capsys: Any) -> None:
    """A wrong key is turned away; an address beyond loopback needs keys; a new key is stored as its digest only."""
    with pytest.raises(tinker.AuthenticationError):
        tinker.ServiceClient(base_url=url, api_key=OTHER).create_lora_training_client("tiny", rank=2).result()
    assert web(url, "").post("create_session", json={}).status_code == 401
    with pytest.raises(ConfigError, match="API key"):
        serve_forever(models, "0.0.0.0", 0, Keys([]))
    file = tmp_path / "keys"
    assert main(["serve", "--keys", str(file), "--new-key"]) == 0
    key = capsys.readouterr().out.strip()
    assert key not in file.read_text()
    keys = Keys(file.read_text().splitlines())
    assert keys.owner(key) == digest_of(key)[:32]
    assert keys.owner(key + "x") is None
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        Keys(["plain"])


def test_nobody_reaches_anothers_things(web: Any, two: str) -> None:
    """Models, sessions, requests and checkpoints of one key do not exist for another."""
    mine, yours = web(two), web(two, OTHER)
    session, made = new_model(mine)
    model = made["model_id"]
    saved = mine.post("save_weights", json={"model_id": model, "path": "one", "seq_id": 1}).json()["request_id"]
    path = finished(mine, saved)["path"]
    own = yours.post("create_session", json={}).json()["session_id"]
    step = {"model_id": model, "seq_id": 2, "adam_params": {}}
    load = {"session_id": own, "model_seq_id": 0, "path": path}
    for verb, body in {
        "get_info": {"model_id": model},
        "optim_step": step,
        "save_weights": {**step, "path": "two"},
        "save_weights_for_sampler": {**step, "path": "two"},
        "load_weights": {**step, "path": path},
        "unload_model": {"model_id": model},
        "weights_info": {"tinker_path": path},
        "create_model": {"session_id": session, "model_seq_id": 1, "base_model": "tiny"},
        "session_heartbeat": {"session_id": session},
        "create_sampling_session": {"session_id": own, "sampling_session_seq_id": 0, "model_path": path},
        "retrieve_future": {"request_id": saved},
    }.items():
        answer = yours.post(verb, json=body)
        assert answer.status_code in (400, 404), (verb, answer.text)
    assert "error" in finished(yours, yours.post("load_weights", json=load).json()["request_id"])
    assert yours.get("training_runs").json()["training_runs"] == []
    assert yours.get("checkpoints").json()["checkpoints"] == []
    assert yours.get(f"training_runs/{model}").status_code == 404
    assert yours.delete(f"training_runs/{model}/checkpoints/weights/one").status_code == 404
    assert [c["tinker_path"] for c in mine.get(f"training_runs/{model}/checkpoints").json()["checkpoints"]] == [path]
    assert mine.post("weights_info", json={"tinker_path": path}).json()["lora_rank"] == 2
    assert mine.get(f"sessions/{session}").json()["training_run_ids"] == [model]
    assert mine.delete(f"training_runs/{model}/checkpoints/weights/one").status_code == 204
    assert mine.get("checkpoints").json()["checkpoints"] == []
    assert mine.post(f"sessions/{session}/finish", json={}).status_code == 204


def test_limits_are_said_and_kept(web: Any, two: str) -> None:
    """Too large a body, too many datums, tokens or models, too high a rank, a bomb: refused; the service goes on."""
    http = web(two)
    session, refused = new_model(http, rank=64)
    assert "takes at most 8" in refused["error"]
    session, made = new_model(http)
    model = made["model_id"]
    assert "holds 1 models" in new_model(http)[1]["error"]
    assert http.post("forward_backward", content=b"x" * 30_000, headers=PROTOBUF).status_code == 413
    bomb = zstandard.compress(b"\0" * 10_000_000)
    assert len(bomb) < 20_000
    packed = {**PROTOBUF, "content-encoding": "zstd"}
    assert http.post("forward_backward", content=bomb, headers=packed).status_code == 413
    assert http.post("forward_backward", content=b"no zstd", headers=packed).status_code == 400
    assert http.post("forward_backward", content=b"", headers={"content-encoding": "br"}).status_code == 400
    data = [{"model_input": {"chunks": [{"tokens": [1] * 4}]}, "loss_fn_inputs": {}}] * 4
    for number, (sent_data, words) in enumerate(
        [(data, "4 datums"), ([{**data[0], "model_input": {"chunks": [{"tokens": [1] * 60}]}}], "60 tokens")], 1
    ):
        inner = {"data": sent_data, "loss_fn": "cross_entropy"}
        sent = {"model_id": model, "seq_id": number, "forward_input": inner}
        assert words in finished(http, http.post("forward", json=sent).json()["request_id"])["error"]
    http.post(f"sessions/{session}/finish", json={})


def test_checkpoints_stay_in_their_folder(service: Any, models: ServedModels) -> None:
    """Names that lead elsewhere are refused."""
    trainer = service.create_lora_training_client("tiny", rank=2).result()
    with pytest.raises(tinker.RequestFailedError, match="no folders"):
        trainer.save_state("..").result()
    with pytest.raises(tinker.RequestFailedError, match="no folders"):
        trainer.save_weights_for_sampler("a/b").result()
    for uri in (
        "tinker://../weights/x",
        f"tinker://{trainer.model_id}/weights/..",
        "file:///etc",
        f"tinker://a/{'b'}/c",
    ):
        with pytest.raises(CheckpointError, match="checkpoint"):
            models.checkpoints.locate(uri)


def test_a_number_of_a_sampling_session_is_used_once(web: Any, url: str) -> None:
    """The same request again is the same session; another one under its number is refused."""
    http = web(url)
    session, made = new_model(http)
    sent = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    assert (
        http.post("create_sampling_session", json=sent).json() == http.post("create_sampling_session", json=sent).json()
    )
    save = {"model_id": made["model_id"], "seq_id": 1, "path": "s"}
    path = finished(http, http.post("save_weights_for_sampler", json=save).json()["request_id"])["path"]
    other = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
    assert "another request" in http.post("create_sampling_session", json=other).json()["detail"]
    save = {"model_id": made["model_id"], "seq_id": 2, "sampling_session_seq_id": 0}
    assert (
        "another request"
        in finished(http, http.post("save_weights_for_sampler", json=save).json()["request_id"])["error"]
    )
    http.post(f"sessions/{session}/finish", json={})


def test_nothing_is_unpickled() -> None:
    """No module of the library loads pickles, or executes text; a planted one is found.

    But for what the processes of one job tell each other, which the first of them has written.
    """

    def found(source: str) -> set[str]:
        names = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names |= {alias.name for node in imports for alias in node.names} | {getattr(n, "module", "") for n in imports}
        return names & {"pickle", "dill", "marshal", "shelve", "torch.load", "torch.save", "eval", "exec", "compile"}

    root = Path(pullback.__file__).parent
    told = root / "service" / "distributed" / "channel.py"
    for path in {*root.rglob("*.py")} - {told}:
        assert not found(path.read_text()), path
    assert found(told.read_text()) == {"pickle"}
    assert found("import pickle") == {"pickle"}
    assert found("torch.load(file)") == {"torch.load"}


def test_too_much_at_once_is_429(gaps: Gaps, web: Any, tmp_path: Path) -> None:
    """Beyond the queue's limit a request is turned away with the time to come back, and is accepted when there is room."""
    with serving(tiny_models(tmp_path), keys=[KEY], limits=Limits(queue=1)) as url:
        http = web(url)
        _, made = new_model(http)
        step = {"model_id": made["model_id"], "adam_params": {}}
        waiting = http.post("optim_step", json={**step, "seq_id": 2}).json()["request_id"]  # 1 has not come
        refused = http.post("optim_step", json={**step, "seq_id": 3})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "holds 1 operations that wait" in refused.json()["detail"]
        gaps.passed()
        assert "did not arrive" in finished(http, waiting)["error"]
        assert http.post("optim_step", json={**step, "seq_id": 3}).status_code == 200
