"""The table of ``pullback check model``: right where a model is right, wrong where a planted fault is, refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="checks of models need transformers and peft (extra hf)")

from pullback.backends.native.models import packed_attention, probes
from pullback.cli import main
from pullback.testing.model_checks import ModelRow, check_model
from pullback.testing.models import zoo


def verdicts(rows: list[ModelRow]) -> dict[str, str]:
    """Verdict by name; the row on the context apart."""
    return {row.name: row.verdict for row in rows if row.name != "beyond the context"}


def windowed() -> Any:
    """A tiny Mistral with a window of 8 tokens."""
    return zoo.build("mistral", window=8)


def test_a_model_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is right, beyond the window too; with attention that counts places in the row, those on forks are wrong."""
    rows = check_model(windowed, lora=2)
    assert set(verdicts(rows).values()) == {"right"}
    assert "log-probs, forked, beyond 8 tokens" in verdicts(rows)
    related = packed_attention.PackedRow._related

    def by_place(row: packed_attention.PackedRow, positions: Tensor) -> Tensor:
        place = torch.arange(len(positions))
        return related(row, positions) & (place[None, :] > place[:, None] - 8)

    monkeypatch.setattr(packed_attention.PackedRow, "_related", by_place)
    assert verdicts(check_model(windowed, lora=2))["log-probs, forked"] == "refused"
    monkeypatch.setattr(probes, "_difference", lambda a, b: 0.0)
    assert verdicts(check_model(windowed, lora=2))["log-probs, forked, beyond 8 tokens"] == "wrong"


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_a_model_that_is_refused(name: str) -> None:
    """A model that does not fit is one row, with the reason in words."""
    (row,) = check_model(lambda: zoo.build(name))
    assert row.verdict == "refused"
    assert "head" in row.reason or "causal" in row.reason


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the table of a folder, as text or JSON, and says by its status whether all is right."""
    zoo.build("bert").save_pretrained(tmp_path)
    assert main(["check", "model", str(tmp_path), "--device", "cpu", "--json"]) == 1
    assert '"verdict": "refused"' in capsys.readouterr().out
