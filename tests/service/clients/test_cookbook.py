"""Recipes of tinker-cookbook, unmodified, as commands against our service on a random model and a local tokenizer."""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pretrained.folders import chat_folder
from servers import KEY, SDK_WARNINGS, rest

from pullback.cli.serve import load_base
from pullback.service import ServedModels, serving

INSTALL = "pip install -e '.[cookbook]' && pip install --no-deps tinker-cookbook==0.6.1"
pytest.importorskip("tinker_cookbook", reason=f"tinker-cookbook is not installed: {INSTALL}")
datasets = pytest.importorskip("datasets", reason=f"the recipes load their data by `datasets`: {INSTALL}")
try:
    datasets.Dataset.from_dict({"one": [1]})
except pickle.PicklingError as error:  # dill takes packages outside of the environment's prefix apart
    reason = f"`datasets` lies outside of this environment and cannot be pickled ({error}): {INSTALL}"
    pytest.skip(reason, allow_module_level=True)
RECIPES = "tinker_cookbook.recipes"
pytestmark = SDK_WARNINGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "chat")


def loaded(folder: Path, name: str | None = None) -> Any:
    """Load a model as the command does."""
    return load_base(Namespace(model=str(folder), name=name, device="cpu", dtype="float32", token_budget=1024))


@pytest.fixture(scope="module")
def cookbook_url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(ServedModels(loaded(folder), tmp_path_factory.mktemp("checkpoints")), keys=[KEY]) as address:
        yield address


class Cook:
    """Runs a recipe in a folder, without a network; returns its metrics, step by step."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    def __call__(self, recipe: str, **given: Any) -> list[dict[str, Any]]:
        log = self.folder / "log"
        arguments = {"log_path": log, "behavior_if_log_dir_exists": "delete", **given}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hub"), "OMP_NUM_THREADS": "1"}
        where = {"TINKER_BASE_URL": self.url, "TINKER_API_KEY": KEY, "TINKER_TELEMETRY": "0"}
        done = subprocess.run(
            [sys.executable, "-m", f"{RECIPES}.{recipe}", *(f"{key}={value}" for key, value in arguments.items())],
            cwd=self.folder,
            env={**os.environ, **offline, **where},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        with rest(self.url) as http:
            rows = http.get("checkpoints", params={"limit": 1000}).json()["checkpoints"]
        last = json.loads((log / "checkpoints.jsonl").read_text().splitlines()[-1])
        assert {last["state_path"], last["sampler_path"]} <= {row["tinker_path"] for row in rows}
        return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def cook(cookbook_url: str, folder: Path, tmp_path: Path) -> Any:
    """Runs a recipe on the model in the folder."""
    return functools.partial(Cook(cookbook_url, tmp_path), model_name=folder)


def test_supervised(cook: Any, tmp_path: Path) -> None:
    """chat_sl learns its conversations, starting from chance, and goes on from its last checkpoint."""
    talk = [
        [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"I say {word}."}]
        for word in ("yes", "no", "maybe", "never") * 6
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))
    given = {"dataset": file, "renderer_name": "qwen3_instruct", "batch_size": 4, "learning_rate": 0.01, "lora_rank": 4}
    found = cook("chat_sl.train", **given, lr_schedule="constant", save_every=2, max_steps=4)
    losses = [step["train_mean_nll"] for step in found]
    assert losses[0] == pytest.approx(math.log(259), abs=0.3)
    assert losses[3] < losses[0] - 0.1
    resumed = {"num_epochs": 2, "max_steps": 8, "behavior_if_log_dir_exists": "resume"}
    more = cook("chat_sl.train", **given, lr_schedule="constant", save_every=2, **resumed)
    assert [step["step"] for step in more] == [0, 1, 2, 3, 6, 7]  # the second epoch, from the last checkpoint
    assert more[-1]["train_mean_nll"] < losses[3]


@pytest.mark.parametrize("renderer", ["qwen3_instruct", "role_colon"])
def test_reinforcement(cook: Any, renderer: str) -> None:
    """The shorter-answers recipe samples, trains and measures; sampler and trainer agree. One renderer stops at strings."""
    found = cook(
        "preference.shorter.train", renderer_name=renderer, batch_size=2, group_size=4, max_tokens=12, max_steps=2
    )
    steps = [one for one in found if "optim/kl_sample_train_v2" in one]
    assert len(steps) == 2
    for step in steps:
        assert abs(step["optim/kl_sample_train_v1"]) < 1e-5
        assert step["optim/entropy"] == pytest.approx(math.log(259), abs=0.3)
        assert step["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", ["cispo", *(pytest.param(loss, marks=pytest.mark.soak) for loss in ("importance_sampling", "dro", "gspo"))]
)
def test_arithmetic(cook: Any, loss: str) -> None:
    """math_rl trains by each loss: the policy that sampled is the one that is trained, so its ratio is 1."""
    found = cook(
        "math_rl.train",
        renderer_name="role_colon",
        loss_fn=loss,
        group_size=4,
        groups_per_batch=2,
        max_tokens=4,
        learning_rate=0.01,
        lora_rank=4,
        max_steps=2,
        eval_every=0,
    )
    steps = [one for one in found if "optim/kl_sample_train_v2" in one]
    assert len(steps) == 2
    for step in steps:
        assert abs(step["optim/kl_sample_train_v1"]) < 1e-5
        assert step["optim/entropy"] == pytest.approx(math.log(259), abs=0.3)


@pytest.mark.soak
def test_a_model_of_the_cookbooks_list(folder: Path, tmp_path: Path, tmp_path_factory: Any) -> None:
    """Served under a name that the cookbook knows, a model needs no renderer_name; the tokenizer is found by that name."""
    name = "Qwen/Qwen3-4B-Instruct-2507"
    (tmp_path / "Qwen").mkdir()
    (tmp_path / name).symlink_to(folder)  # in place of a hub
    with serving(ServedModels(loaded(folder, name), tmp_path_factory.mktemp("checkpoints")), keys=[KEY]) as address:
        found = Cook(address, tmp_path)(
            "math_rl.train",
            model_name=name,
            loss_fn="importance_sampling",
            group_size=4,
            groups_per_batch=1,
            max_tokens=4,
            lora_rank=4,
            max_steps=1,
            eval_every=0,
        )
    assert abs(found[0]["optim/kl_sample_train_v1"]) < 1e-5


def test_preference(cook: Any, tmp_path: Path) -> None:
    """dpo begins at log 2, as policy and reference are one, and falls; every loss costs one forward."""
    pairs = [
        {
            side: f"\n\nHuman: What is {i} and {i}?\n\nAssistant: {answer}"
            for side, answer in (("chosen", f"It is {2 * i}."), ("rejected", "No."))
        }
        for i in range(12)
    ]
    data = tmp_path / "Anthropic" / "hh-rlhf"  # what the recipe loads; `datasets` looks here first
    data.mkdir(parents=True)
    for split, rows in (("train", pairs), ("test", pairs[:4])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cook(
        "preference.dpo.train",
        dataset="hhh",
        renderer_name="role_colon",
        batch_size=4,
        max_steps=3,
        learning_rate=0.001,
    )
    losses = [step["dpo_loss"] for step in found]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 1e-3
    assert all(step["forward_tokens:sum"] == 0 for step in found)


@pytest.mark.slow
def test_weights_are_downloaded(
    cookbook_url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cookbook's own download of a training checkpoint, which it exports encrypted, and of an export: peft loads both."""
    import peft
    import tinker
    import transformers

    weights: Any = pytest.importorskip("tinker_cookbook.weights")
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with tinker.ServiceClient(base_url=cookbook_url, api_key=KEY) as service:
        client = service.create_lora_training_client(str(folder), rank=2, train_unembed=False).result()
        paths = {
            "weights": client.save_state("one").result().path,
            "external_weights": client.save_weights_external("two").result().path,
        }
    for kind, path in paths.items():
        out = tmp_path / kind
        weights.download(tinker_path=path, output_dir=str(out), base_url=cookbook_url)
        assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert peft.PeftModel.from_pretrained(base, out).peft_config["default"].r == 2
    with rest(cookbook_url) as http:
        rows = http.get("checkpoints", params={"limit": 1000}).json()["checkpoints"]
    assert {row["tinker_path"] for row in rows if row["checkpoint_type"] == "external"} == {paths["external_weights"]}
