"""``--model`` takes the same names in every command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained.folders import chat_folder

from pullback.backends import TorchBackend
from pullback.cli import main
from pullback.cli.arguments.models import MODEL_HELP, load_named
from pullback.cli.demo.backends import native
from pullback.cli.demo.data import own_tasks
from pullback.cli.demo.models import pretrained
from pullback.cli.demo.objectives import objectives
from pullback.errors import CheckpointError, ConfigError
from pullback.testing import random_llama

_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def test_tiny_and_folders(tmp_path: Path) -> None:
    """``tiny`` is a random Llama without a tokenizer; a folder brings its model and its tokenizer, in any dtype."""
    tiny = load_named("tiny", dtype="bfloat16", device="cpu", config={"vocab_size": 50})
    assert (tiny.tokenizer, tiny.folder, tiny.model.config.vocab_size) == (None, None, 50)
    assert tiny.model.dtype == torch.bfloat16
    loaded = load_named(str(chat_folder(tmp_path)), device="cpu")
    assert loaded.folder == tmp_path
    assert loaded.tokenizer.decode(loaded.tokenizer("text")["input_ids"]) == "text"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_named(str(tmp_path), device="cpu").tokenizer is None


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Any other name is refused, by every command that takes one, and the message lists what there is."""
    with pytest.raises(ConfigError, match=re.escape(f"{MODEL_HELP}, got 'smolm2'")):
        load_named("smolm2")
    for command in (["check", "sampling"], ["bench", "numerics"], ["demo", "--device", "cpu"]):
        assert main([*command, "--model", "smolm2"]) == 2
        assert MODEL_HELP in capsys.readouterr().err


def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused in words before anything is loaded, and so is a word that is no device; those of torch are taken."""
    elsewhere = "mps" if torch.cuda.is_available() else "cuda"
    for device in (elsewhere, "gpu"):
        with pytest.raises(ConfigError, match=f"--device {device} cannot be used here: .*; here is: "):
            load_named("smolm2", device=device)
    assert main(["serve", "--model", "tiny", "--device", elsewhere, "--port", "0"]) == 2
    assert f"--device {elsewhere} cannot be used here" in capsys.readouterr().err
    assert load_named("tiny", device="cpu:0").model.device.type == "cpu"


def test_plans_take_the_same_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan of ``tiny`` is that of its config in a folder; a name of a hub is refused at once."""
    random_llama().config.save_pretrained(tmp_path)
    printed = []
    for name in ("tiny", str(tmp_path), str(tmp_path / "config.json")):
        assert main(["plan", "--model", name, "--tokens", "50", "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert main(["plan", "--model", "org/model"]) == 2
    assert "got 'org/model', which is no folder here" in capsys.readouterr().err


def test_names_of_the_commands_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not looked up at a hub: the error says what makes the same model. A folder of such a name is a folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "smollm2"):
        assert name in MODEL_HELP
        with pytest.raises(CheckpointError, match=f"'{name}' is a name of the commands; in Python: TorchBackend"):
            TorchBackend.from_pretrained(name)
    loaded: Any = random_llama(vocab_size=50)
    with pytest.raises(
        ConfigError, match=r"got LlamaForCausalLM; .*: TorchBackend\(pullback.backends.HFModel\(model\)\)"
    ):
        TorchBackend.from_pretrained(loaded)
    loaded.save_pretrained("tiny")
    assert TorchBackend.from_pretrained("tiny").vocab_size == 50


def test_a_folder_in_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The measurements run on a folder, and the demo trains on it if its tokenizer knows how to chat."""
    folder = str(chat_folder(tmp_path))
    assert main(["check", "sampling", "--model", folder]) == 0
    assert "mean the same policy" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="chat template"):
        pretrained(folder, "cpu", "float32")
    (tmp_path / "chat_template.jinja").write_text(_TEMPLATE)
    model = pretrained(folder, "cpu", "float32")
    assert model.chat("2 + 2?") == "<|im_start|>user\n2 + 2?<|im_end|>\n"
    (objective,) = objectives(model, own_tasks(model, 0), 0, ["dpo"])
    with native(model) as backend:
        objective.prepare(backend)
        metrics: Any = objective.step(backend, objective.params(0, 8))
    assert metrics["loss_per_unit:mean"] == pytest.approx(0.6931, abs=1e-3)
