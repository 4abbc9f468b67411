"""`pullback diff` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_data
from servers import KEY, SDK_WARNINGS

from pullback.cli import main
from pullback.cli.arguments.backends import open_backend
from pullback.errors import ConfigError
from pullback.service import Base, ServedModels, serving
from pullback.testing import random_llama

SHORT = ["--lengths", "9,5"]


def written(path: Path) -> str:
    """A file of datums."""
    lines = [
        {"model_input": d.model_input.to_ints(), "loss_fn_inputs": {k: v.tolist() for k, v in d.loss_fn_inputs.items()}}
        for d in make_data([6, 4])
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_the_same_and_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0 where two backends agree and 1 where they part; the JSON says what the report says."""
    file = tmp_path / "found.json"
    same = ["diff", "--a", "fake", "--b", "fake", "--loss", "grpo", "--json", str(file), *SHORT]
    assert main(same) == 0
    assert "no divergence" in capsys.readouterr().out
    assert json.loads(file.read_text())["diverges"] is False
    other = [
        "diff",
        "--a",
        "fake",
        "--b",
        "native:tiny",
        "--data",
        written(tmp_path / "data.jsonl"),
        "--json",
        str(file),
    ]
    assert main(other) == 1
    assert "first divergence: logprobs" in capsys.readouterr().out
    assert json.loads(file.read_text())["first"] == "logprobs"


def test_native_models(capsys: pytest.CaptureFixture[str]) -> None:
    """A model and its adapted self begin as the same, and half precision is judged as such."""
    half = ["--dtype-b", "bfloat16", "--rank", "2", "--loss", "dpo", "--loss-config", '{"beta": 0.5}']
    assert main(["diff", "--a", "native:tiny", "--b", "native:tiny", *SHORT, *half]) == 0
    assert "native:tiny (b, bfloat16)" in capsys.readouterr().out


def test_the_command_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """That of docs/checking.md compares every stage, and says whose tolerance it took; a smaller step is lost in rounding."""
    page = (Path(__file__).parents[2] / "docs" / "checking.md").read_text()
    (command,) = re.findall(r"^    pullback (diff --a native:tiny .*bfloat16.*)$", page, re.M)
    assert main(command.split()) == 0
    assert capsys.readouterr().out.count(" within bfloat16's tolerance ") == 5
    assert main([*command.split(), "--learning-rate", "1e-3", *SHORT]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" within bfloat16's tolerance ") == 4
    assert re.search(r"update +not compared .*rounding alone may by \S+; only \S+ or more .*--learning-rate", printed)


def test_names_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is misspelt is refused, with what there is."""
    for name in ("native", "remote:", "tiny", "native:"):
        with pytest.raises(ConfigError, match="fake, native:MODEL or remote:URL"):
            open_backend(name)
    with pytest.raises(ConfigError, match="--base-model"):
        open_backend("remote:http://127.0.0.1:1")
    assert main(["diff", "--a", "fake", "--b", "fake", "--lengths", "many"]) == 2
    assert "--lengths is numbers" in capsys.readouterr().err
    assert main(["diff", "--a", "fake", "--b", "fake", "--data", str(tmp_path / "none")]) == 2
    with pytest.raises(SystemExit):
        main(["diff", "--a", "fake", "--b", "fake", "--loss-config", "[]"])


class TestServed:
    pytestmark = SDK_WARNINGS

    def test_native_and_served(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The model of our service, over HTTP, is the native one with the adapter of its seed."""
        monkeypatch.setenv("TINKER_TELEMETRY", "0")
        monkeypatch.setenv("TINKER_API_KEY", KEY)
        models: Any = ServedModels(Base("tiny", random_llama(dtype=torch.float32)), tmp_path)
        with serving(models, keys=[KEY]) as url:
            sides = ["diff", "--a", "native:tiny", "--b", f"remote:{url}", "--loss", "grpo", *SHORT]
            assert main(sides) == 0
            assert "not compared" in capsys.readouterr().out
            assert main([*sides, "--allow-step", "--seed", "3"]) == 0
            assert capsys.readouterr().out.count(" within float32's tolerance ") == 5
