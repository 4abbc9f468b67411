"""The examples for trainers, as they are: they are short, and those that the suite's environment has all for run."""

from __future__ import annotations

import gc
import runpy
from pathlib import Path

import pytest
from servers import SDK_WARNINGS

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "trainers"
NEEDS = {
    "bare_loop": "transformers",
    "transformers_trainer": "transformers",
    "transformers_dpo": "transformers",
    "tinker_sdk": "tinker",
    "fireworks_training": "fireworks.training.sdk",
}

pytestmark = [*SDK_WARNINGS, pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")]


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(example: Path) -> None:
    """Under 60 lines each."""
    assert len(example.read_text().splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each trains, and prints what it comes to; its gradients are held to plain formulas by the tests beside this one."""
    pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    gc.collect()  # closes what an SDK left open, while its warnings are ignored
    assert capsys.readouterr().out
