"""The table of ``pullback check model``: right where a model is right, wrong where a planted fault is, refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="checks of models need transformers and peft (extra hf)")

from peft import LoraConfig

from pullback.backends.native.models import packed_attention
from pullback.backends.native.models.facts import probes
from pullback.cli import main
from pullback.errors import ConfigError
from pullback.testing.modelcheck import rows
from pullback.testing.modelcheck.check import ModelRow, check_model
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


def test_what_is_trained() -> None:
    """The row says what has no adapter; it is wrong where no layer has one, though the head has."""
    head_alone = LoraConfig(r=2, target_modules=["lm_head"])
    found = [{r.name: r for r in check_model(windowed, lora=lora)}["what is trained"] for lora in (2, head_alone)]
    assert [row.verdict for row in found] == ["right", "wrong"]
    assert found[0].reason == "no adapter on: lm_head"
    assert found[1].reason.startswith("no layer is adapted; no adapter on: down_proj, gate_proj")


def test_a_model_is_loaded_three_times() -> None:
    """Once as it is, once with an adapter, once more to resume: no row loads another."""
    loads = []

    def load() -> Any:
        loads.append(1)
        return windowed()

    assert set(verdicts(check_model(load, lora=2)).values()) == {"right"}
    assert len(loads) == 3


def test_a_difference_that_is_no_number_is_wrong() -> None:
    """NaN is no agreement."""
    (figure,) = {
        rows.largest_difference([torch.tensor(x)], [torch.zeros(2)]) for x in ([0.0, math.nan], [math.nan, 0.0])
    }
    assert rows.verdict_on(figure, 1.0, "single")[0] == "wrong"


def test_command_on_a_named_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The command takes the names that every command takes, and all is right of the random Llama."""
    assert main(["check", "model", "tiny", "--device", "cpu", "--rank", "2"]) == 0
    table = capsys.readouterr().out
    assert "log-probs, forked, 1,024 tokens              right" in table
    assert table.splitlines()[-1] == "17 right"
    assert main(["check", "model", "no such folder", "--device", "cpu"]) == 1
    assert "--model must be smollm2, tiny" in capsys.readouterr().out


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the table of a folder, as text or JSON, and says by its status whether all is right."""
    zoo.build("bert").save_pretrained(tmp_path)
    assert main(["check", "model", str(tmp_path), "--device", "cpu", "--json"]) == 1
    assert '"verdict": "refused"' in capsys.readouterr().out


def test_rows_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of a model are listed one a line, quoted, as their names have commas; a close one is suggested."""
    assert main(["check", "model", "tiny", "--device", "cpu", "--rank", "2", "--only", "nope"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "pullback: there is no row 'nope'; the rows of this model are:"
    assert {"  'log-probs, single'", "  'sampling'"} <= set(told[1:])
    with pytest.raises(ConfigError, match="did you mean 'sampling'"):
        check_model(windowed, lora=2, only="samplng")
