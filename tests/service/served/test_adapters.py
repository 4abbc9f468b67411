"""What an adapter is where nobody says so, and what it becomes when a checkpoint is loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import distance, make_data, weights_of
from servers import KEY, SDK_WARNINGS, Direct, adapter, new_model, rest, served, tiny_models

import pullback
from pullback import AdamParams, TorchBackend
from pullback.backends import HFModel
from pullback.backends.native.models.lora import LoraChoice, add_lora, set_alpha
from pullback.errors import CheckpointError
from pullback.service import Base, ServedModels, serving
from pullback.service.durability.journal import Journal
from pullback.testing import random_llama

pytest.importorskip("transformers", reason="needs transformers and peft (extra hf)")
pytest.importorskip("tinker", reason="needs the official SDK (extra remote)")
pytestmark = SDK_WARNINGS

GOLDEN = Path(__file__).parents[2] / "golden"
OLD = GOLDEN / "old_state"
URI = "tinker://sess:train:0/weights/old"


def maker() -> Any:
    """The script that wrote the old state."""
    spec = importlib.util.spec_from_file_location("make_old_state", GOLDEN / "make_old_state.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def old_base() -> Any:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(OLD / "base", dtype=torch.float32)


def expected(kind: str) -> torch.Tensor:
    return torch.tensor(json.loads((OLD / "expected.json").read_text())[kind])


def step(backend: Any) -> None:
    backend.forward_backward(make_data([6, 5, 7, 4]), "cross_entropy").result()
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()


def updates(lora: Any, models: Any, url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps from one start: by a native backend on ``lora``, and at a service that is told the rank alone."""
    with pullback.connect(url, base_model="tiny", rank=4, api_key=KEY) as remote:
        theirs = served(models, remote.trainer)
        ours = TorchBackend(HFModel(add_lora(models.base.copy(), lora)), token_budget=64)
        start = adapter(theirs)
        assert all(p.shape == start[name].shape for name, p in weights_of(ours).items())
        ours.model.load_state_dict(start, strict=False)
        for _ in range(2):
            step(ours)
            step(remote)
        return weights_of(ours), adapter(theirs)


def test_silence_means_the_same_everywhere(models: Any, url: str) -> None:
    """A rank alone, in this process and at a service by `connect`: the same layers, scale and update."""
    ours, theirs = updates(4, models, url)
    assert {name.split(".")[-4] for name in ours} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert distance(ours, theirs) == 0.0


def test_another_alpha_is_noticed(models: Any, url: str) -> None:
    """The control: with alpha = 2 x rank the updates differ."""
    ours, theirs = updates(LoraChoice(4, alpha=8), models, url)
    assert distance(ours, theirs) > 1e-3


def test_a_plain_request_means_the_same_and_an_explicit_one_wins(models: Any, url: str) -> None:
    """Of a request that names its rank alone, and of one that says all."""
    with rest(url) as http:
        _, made = new_model(http)
        assert models.choices[made["model_id"]] == LoraChoice(2)
        _, made = new_model(http, alpha=4, train_unembed=True, train_mlp=False)
        assert models.choices[made["model_id"]] == LoraChoice(2, alpha=4, train_unembed=True, train_mlp=False)
        config = models.backends[made["model_id"]].model.model.peft_config["default"]
        assert (config.lora_alpha, "lm_head" in config.target_modules) == (4, True)


def test_the_sdk_says_that_it_trains_the_head(models: Any, service: Any) -> None:
    """Its own default is explicit on the wire."""
    client = service.create_lora_training_client("tiny", rank=2).result()
    assert models.choices[client.model_id] == LoraChoice(2, train_unembed=True)


def test_a_native_checkpoint_brings_its_alpha(tmp_path: Path) -> None:
    """A rank alone takes it over; an explicit other one is refused; another rank too; the folder makes the same adapter."""
    saved = TorchBackend(HFModel(add_lora(random_llama(), LoraChoice(2, alpha=7))), checkpoint_dir=tmp_path)
    step(saved)
    path = saved.save_state("seven").result().path
    logprobs = saved.forward(make_data([6, 5, 7, 4]), "cross_entropy").result().loss_fn_outputs
    for lora in (2, path, Path(path)):
        backend = TorchBackend(HFModel(add_lora(random_llama(), lora)))
        backend.load_state(path).result()
        found = backend.forward(make_data([6, 5, 7, 4]), "cross_entropy").result().loss_fn_outputs
        assert all(a["logprobs"].data == b["logprobs"].data for a, b in zip(found, logprobs, strict=True))
    for other, words in ((LoraChoice(2), "alpha 7.* alpha 32"), (3, "rank 2.* rank 3")):
        backend = TorchBackend(HFModel(add_lora(random_llama(), other)))
        before = weights_of(backend)
        with pytest.raises(CheckpointError, match=words):
            backend.load_state(path).result()
        assert distance(weights_of(backend), before) == 0.0
    with pytest.raises(CheckpointError, match="no checkpoint of an adapter"):
        add_lora(random_llama(), tmp_path)


def test_an_old_native_checkpoint_means_what_it_meant() -> None:
    """Alpha was 2 x rank; a wrong alpha is noticed."""
    script = maker()
    backend = TorchBackend(HFModel(add_lora(old_base(), 4)))
    backend.load_state_with_optimizer(OLD / "native").result()
    assert backend.weights_version == 2
    assert (torch.tensor(script.logprobs(backend)) - expected("native")).abs().max() < 1e-5
    wrong = TorchBackend(HFModel(add_lora(old_base(), LoraChoice(4, alpha=8))))
    wrong.load_state(OLD / "native").result()
    model: Any = wrong.model
    set_alpha(model.model, 32)
    assert (torch.tensor(script.logprobs(wrong)) - expected("native")).abs().max() > 1e-2


@pytest.fixture
def old(tmp_path: Path) -> Any:
    """A service on what an older one left."""
    shutil.copytree(OLD / "served", tmp_path / "served")
    found = Direct(tmp_path / "served", ServedModels(Base("tiny", old_base()), tmp_path / "served"))
    yield found
    found.sequencer.close()


def call(direct: Direct, verb: str, given: dict[str, Any]) -> Any:
    request = getattr(direct.operations, verb)("", json.dumps(given).encode(), given)
    return direct.sequencer.result("", request).result(timeout=120)


def test_an_old_journal_means_what_it_meant(old: Any) -> None:
    """Null for alpha is the rank, the head has an adapter; models and samplers made from its checkpoints say the same."""
    row = old.journal.model("sess:train:0")
    assert json.loads(row["lora"])["alpha"] is None
    assert LoraChoice.from_json(row["lora"]) == LoraChoice(2, alpha=2, train_unembed=True)
    given = {"session_id": "sess", "model_seq_id": 1, "path": URI, "optimizer": True}
    made = call(old, "create_model", given)
    assert made["type"] == "load_weights"
    backend = old.models.backends["sess:train:1"]
    assert (torch.tensor(maker().logprobs(backend)) - expected("served")).abs().max() < 1e-5
    tokens = pullback.ModelInput.from_ints([3, 1, 4])
    sampler = old.models.saved_sampler("tinker://sess:train:0/sampler_weights/old")
    data = [pullback.Datum(tokens, {"target_tokens": [1, 4, 1], "weights": [1.0] * 3})]
    scored = backend.forward(data, "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    assert sampler.prompt_logprobs(tokens)[1:] == pytest.approx(scored[:2], abs=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
def test_loading_an_old_checkpoint_into_a_new_model(old: Any, explicit: bool) -> None:
    """A model that named no alpha and no layers takes the checkpoint's; one that named others keeps its own, and says so."""
    lora = {"rank": 2, **({"alpha": 32, "train_unembed": False} if explicit else {})}
    given = {"session_id": "sess", "model_seq_id": 1, "base_model": "tiny", "lora_config": lora}
    call(old, "create_model", given)
    answer = call(old, "load_weights", {"model_id": "sess:train:1", "seq_id": 1, "path": URI})
    row = LoraChoice.from_json(old.journal.model("sess:train:1")["lora"])
    if explicit:
        assert "alpha 2.0 (here 32)" in answer.text
        assert "train_unembed True (here False)" in answer.text
        assert row == LoraChoice(2)
        return
    assert row == replace(LoraChoice(2), alpha=2, train_unembed=True)
    backend = old.models.backends["sess:train:1"]
    assert (torch.tensor(maker().logprobs(backend)) - expected("served")).abs().max() < 1e-5


def test_a_journal_of_today_says_its_alpha(tmp_path: Path) -> None:
    """So that null keeps its old meaning."""
    journal = Journal(tmp_path / "journal.sqlite")
    journal.add_model("m", "s", "me", LoraChoice(2).to_json(), None)
    row = journal.model("m")
    assert row is not None
    assert json.loads(row["lora"])["alpha"] == 32
    journal.close()


def test_the_service_resumes_a_headless_model_by_the_sdk(tmp_path: Path) -> None:
    """`connect`, save, load: the new client's model has the same adapter."""
    models = tiny_models(tmp_path)
    with serving(models, keys=[KEY]) as url, pullback.connect(url, base_model="tiny", rank=2, api_key=KEY) as backend:
        step(backend)
        path = backend.save_state("one").result().path
        saved = adapter(served(models, backend.trainer))
        backend.load_state(path).result()
        assert models.choices[backend.trainer.model_id] == LoraChoice(2)
        assert distance(adapter(served(models, backend.trainer)), saved) == 0.0
