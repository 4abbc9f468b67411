"""`pullback check loss`, and the pytest plugin, as a user runs them: in a folder of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pullback.cli import main

ALIAS = Path(__file__).parents[2] / ".alias"
LOSSES = """
import torch

def sound(logprobs, mask):
    return -torch.where(mask, logprobs, 0.0).sum() / mask.sum().clamp(min=1)

def broken(logprobs, mask):
    return -(logprobs * mask).sum() / mask.sum().clamp(min=1)

def scaled(logprobs, advantages, mask, beta, mode):
    assert advantages.dim() == 1 and mode == "mean"
    gain = torch.where(mask, logprobs, 0.0).sum(1) * advantages
    return -beta * gain.sum() / mask.any(1).sum().clamp(min=1)
"""
TESTS = """
import sys
from importlib import import_module

def test_nothing_is_loaded():
    assert not {"torch", "hypothesis", "pullback"} & set(sys.modules)

def test_fixture(pullback_check):
    pullback_check(import_module("plugin_losses").sound, form="padded")
"""
CLASSES = """
from plugin_losses import broken, sound
from pullback.testing import LossProperties

class TestSound(LossProperties):
    loss = sound
    options = {"form": "padded"}

class TestBroken(LossProperties):
    loss = staticmethod(broken)
    options = {"form": "padded"}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two losses, which is the current one."""
    (tmp_path / "plugin_losses.py").write_text(LOSSES)
    (tmp_path / "half_there.py").write_text("import nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "plugin_losses", raising=False)
    return tmp_path


def test_table_and_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sound loss has status 0, a broken one 1, with the property, its cause, and the line that shows it again."""
    assert main(["check", "loss", "plugin_losses:sound", "--form", "padded", "--fast"]) == 0
    assert "passed" in capsys.readouterr().out
    assert main(["check", "loss", "plugin_losses:broken", "--form", "padded", "--fast"]) == 1
    out = capsys.readouterr().out
    assert "poison: failed" in out
    assert "torch.where" in out
    assert "again: check_loss(broken" in out


def test_json_and_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON, of a registered loss by its name, and of chosen properties only."""
    assert main(["check", "loss", "dpo", "--only", "differences", "--only", "kind", "--fast", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["property"] for row in report["results"]] == ["differences", "kind"]
    assert report["sound"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["grop"], "did you mean 'grpo'"),
        (["plugin_losses:nothing"], "there is no plugin_losses:nothing"),
        (["nowhere:nothing"], "there is no nowhere:nothing"),
        (["nowhere.deeper:nothing"], "there is no nowhere.deeper:nothing"),
        (["half_there:loss"], "half_there is there, but cannot be imported: No module named 'nowhere'"),
        (["plugin_losses.py"], "given as package.module:function (here: plugin_losses:function)"),
        (["some/plugin_losses.py:sound"], "names a file: give its module, some.plugin_losses:sound"),
        (["grpo", "--only", "diferences"], "did you mean 'differences'"),
    ],
)
def test_mistakes(arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not there has status 2, and says so."""
    assert main(["check", "loss", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("beta", "status"), [("0.5", 0), ("-0.5", 1)])
def test_arguments_of_its_own(beta: str, status: int, folder: Path) -> None:
    """Numbers and words for what a function takes besides, and inputs of one number per sequence, as check_loss has them."""
    given = ["--argument", f"beta={beta}", "--argument", "mode=mean", "--per-sequence", "advantages"]
    assert main(["check", "loss", "plugin_losses:scaled", *given, "--only", "direction", "--fast"]) == status


def test_what_an_argument_is_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing one is told with the option that gives it; what is no name and value is refused."""
    assert main(["check", "loss", "plugin_losses:scaled", "--argument", "mode=mean", "--fast"]) == 2
    assert "--argument beta=value" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["check", "loss", "plugin_losses:scaled", "--argument", "beta"])
    assert "'beta' is not NAME=VALUE, e.g. beta=0.1" in capsys.readouterr().err


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder with this plugin and no other."""
    environment = {**os.environ, "PYTHONPATH": f"{ALIAS}:{folder}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "pullback_pytest", "-p", "no:cacheprovider", "-q", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not ALIAS.is_dir(), reason="needs the source tree")
def test_plugin(folder: Path) -> None:
    """The plugin loads neither torch nor hypothesis before its fixture is used; a class has one test per property."""
    (folder / "test_first.py").write_text(TESTS)
    done = run_pytest(folder, "test_first.py", "--pullback-profile", "fast")
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    (folder / "test_classes.py").write_text(CLASSES)
    done = run_pytest(folder, "test_classes.py", "--pullback-profile", "fast", "-rf")
    assert "TestBroken::test_poison" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("FAILED") == 1
    assert "1 failed" in done.stdout
    assert "TestSound" not in done.stdout.partition("short test summary")[2]
