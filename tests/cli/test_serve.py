"""`pullback serve` takes the models that the other commands take."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from pullback import AdamParams, Datum, ModelInput, connect
from pullback.cli import main, serve
from pullback.cli.arguments.models import load_named
from pullback.cli.serve import load_base
from pullback.errors import ConfigError
from pullback.service import ServedModels, serving
from pullback.service.limits import Limits
from pullback.testing import random_llama

pytest.importorskip("transformers", reason="needs transformers and peft (extra hf)")
pytest.importorskip("tinker", reason="needs the official SDK (extra remote)")
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def given(model: str) -> Namespace:
    return Namespace(model=model, name=None, device="cpu", dtype="float32", token_budget=64)


def test_tiny_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without a tokenizer trains."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    base = load_base(given("tiny"))
    assert (base.name, base.tokenizer_id) == ("tiny", None)
    data = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})]
    with serving(ServedModels(base, tmp_path)) as url, connect(url, base_model="tiny", rank=2) as backend:
        backend.forward_backward(data, "cross_entropy").result()
        assert backend.optim_step(AdamParams()).result().metrics["grad_norm"] > 0


def test_a_folder_is_a_model_and_other_words_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same names in every command; a misspelt one is refused with the names that are known."""
    random_llama().save_pretrained(tmp_path / "model")
    assert load_named(str(tmp_path / "model"), device="cpu").folder == tmp_path / "model"
    assert load_named("tiny").folder is None
    with pytest.raises(ConfigError, match=r"smollm2, tiny .* or a folder"):
        load_base(given("tinny"))
    with pytest.raises(ConfigError, match="dtype must name"):
        load_named("tiny", dtype="floaty")
    assert main(["serve", "--model", "tinny"]) == 2
    assert "got 'tinny'" in capsys.readouterr().err


def test_quotas_are_given_by_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each quota of a key has a flag; what is not given is a fair share, and what is no count is refused."""
    served: list[Limits] = []
    monkeypatch.setattr(serve, "serve_forever", lambda *given, **options: served.append(given[4]))
    command = ["serve", "--model", "tiny", "--checkpoints", str(tmp_path)]
    assert main([*command, "--models-per-key", "3", "--disk-per-key", "1000000"]) == 0
    assert served == [Limits(models_per_key=3, disk_per_key=1_000_000)]
    assert main(command) == 0
    assert served[1] == Limits()
    assert main([*command, "--queue-per-key", "0"]) == 2
    assert len(served) == 2
