"""`pullback serve --import`: losses that a plain file registers are known at the service by their names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pullback.cli import main, serve
from pullback.losses import loss_names, registry

pytest.importorskip("transformers", reason="needs transformers and peft (extra hf)")
tinker = pytest.importorskip("tinker", reason="needs the official SDK (extra remote)")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # the SDK's connections

LOSS = """
from dataclasses import dataclass
from typing import ClassVar
from pullback.losses import Loss, TokenTerm, register
from pullback.losses.functional import nll

@register
@dataclass(frozen=True)
class Mine(Loss):
    scale: float = 1.0
    aggregation: str = "sum"
    name: ClassVar = {name!r}
    gradient_kind: ClassVar = "constant"
    sources: ClassVar = ()
    required_inputs: ClassVar = ("weights",)

    def terms(self, batch):
        return (TokenTerm("nll", nll, (), self.main_aggregation, self.scale),)
"""
FILES = {
    "file_of_a_loss.py": LOSS.format(name="scaled_nll"),
    "imports_it.py": "from file_of_a_loss import Mine",
    "folder_of_losses/__init__.py": "from . import inner",
    "folder_of_losses/inner.py": LOSS.format(name="scaled_nll_of_a_folder"),
    "registers_none.py": "scale = 2.0",
    "takes_a_name.py": LOSS.format(name="grpo"),
    "is_no_python.py": "def",
    "lacks_a_module.py": "import nowhere_at_all",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with these files; what they register is forgotten at the end."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), False)
    loss_names()
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """The command that serves, up to the moment at which it would."""
    monkeypatch.setattr(serve, "serve_forever", lambda *given, ready, **options: ready())
    return ["serve", "--model", "tiny", "--checkpoints", str(folder / "checkpoints"), "--port", "0"]


def test_each_module_says_what_it_registers(served: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A file, a folder, and one that another has imported before; all of it before the model is served."""
    assert main([*served, "--import", "imports_it", "--import", "file_of_a_loss", "--import", "folder_of_losses"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "losses of imports_it: scaled_nll",
        "losses of file_of_a_loss: scaled_nll",
        "losses of folder_of_losses: scaled_nll_of_a_folder",
    ]
    assert "tiny on http" in printed[3]
    assert {"scaled_nll", "scaled_nll_of_a_folder"} <= set(loss_names())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("nowhere_at_all", "there is no nowhere_at_all: No module named"),
        ("file_of_a_loss.deeper", "there is no file_of_a_loss.deeper: No module named"),
        ("lacks_a_module", "lacks_a_module is there, but cannot be imported: No module named 'nowhere_at_all'"),
        ("is_no_python", "is_no_python is there, but cannot be imported: SyntaxError:"),
        ("takes_a_name", "cannot be imported: DuplicateLossError: the name 'grpo' belongs to pullback.losses"),
        ("registers_none", "registers_none registers no loss: put @register (from pullback.losses)"),
        ("./file_of_a_loss.py", "'./file_of_a_loss.py' names a file: give its module, file_of_a_loss"),
        ("folder_of_losses/inner.py", "names a file: give its module, folder_of_losses.inner"),
        ("file_of_a_loss:Mine", "give a module, as in an import (package.module), got 'file_of_a_loss:Mine'"),
    ],
)
def test_mistakes(module: str, words: str, served: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They are said before a model is loaded, and nothing is served."""
    assert main([*served, "--import", module]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("imports", [["--import", "file_of_a_loss"], []])
def test_a_client_names_the_loss(imports: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's process has no such class; without the option the service does not know it either."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    command = [sys.executable, "-P", "-m", "pullback", "serve", "--model", "tiny", "--port", "0", *imports]
    with started(command, folder) as process:
        url = next(found[1] for line in process.stdout or () if (found := re.search(r"on (http://\S+)", line)))
        with tinker.ServiceClient(base_url=url, api_key="tml-none") as service:
            answer = asked(service)
            if imports:
                assert answer.result().metrics["loss:sum"] == pytest.approx(3 * answered(service), rel=1e-6)
            else:
                with pytest.raises(tinker.RequestFailedError, match="unknown loss 'scaled_nll'"):
                    answer.result()


@contextmanager
def started(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in a folder, which is ended."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=dict(os.environ)) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


def asked(service: Any, loss: str = "scaled_nll", config: Any = None) -> Any:
    """A loss on one datum, of a new model."""
    inputs = {"target_tokens": [2, 3], "weights": [1.0, 0.5]}
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([1, 2]), loss_fn_inputs=inputs)
    trainer = service.create_lora_training_client("tiny", rank=2).result()
    return trainer.forward_backward([datum], loss, {"scale": 3.0} if config is None else config)


def answered(service: Any) -> float:
    """The protocol's cross-entropy of the same datum."""
    return float(asked(service, "cross_entropy", {}).result().metrics["loss:sum"])
