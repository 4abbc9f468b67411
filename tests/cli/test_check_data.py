"""`pullback check data`: a table with what is trained, JSON, and a status."""

from __future__ import annotations

import json

import pytest

from pullback.backends.native.models import tokenizers
from pullback.cli import main


def test_a_table_with_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong row says why, and marks the tokens that are trained; the status is 1."""
    assert main(["check", "data", "pullback.testing.museum.data:_header_trained"]) == 1
    printed = capsys.readouterr().out
    assert "add_generation_prompt=True" in printed
    assert "\n    * '<|im_start|>assistant\\n" in printed
    assert printed.splitlines()[-1] == "6 right, 1 wrong, 1 not applicable"


def test_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    """The library's own builder is right; as JSON too, and one row alone."""
    assert main(["check", "data", "pullback.datums:datum_from_messages", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["verdict"] for row in rows} == {"right"}
    assert main(["check", "data", "pullback.datums:datum_from_messages", "--only", "end"]) == 0
    assert capsys.readouterr().out == "end          right\n1 right\n"


def test_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """A place or a tokenizer that does not exist is refused in words."""
    assert main(["check", "data", "datum_from_messages"]) == 2
    assert "package.module:name" in capsys.readouterr().err
    assert main(["check", "data", "pullback.datums:nothing"]) == 2
    assert "there is no pullback.datums:nothing" in capsys.readouterr().err
    pytest.importorskip("transformers", reason="tokenizers of models need transformers (extra hf)")
    assert main(["check", "data", "pullback.datums:datum_from_messages", "--tokenizer", "no such folder"]) == 2
    assert "--tokenizer must be tiny" in capsys.readouterr().err


def test_a_name_of_a_hub_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no folder is refused at once."""
    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda *given: pytest.fail("it was looked up"))
    assert main(["check", "data", "pullback.datums:datum_from_messages", "--tokenizer", "nofolder"]) == 2
    assert "got 'nofolder', which is no folder here" in capsys.readouterr().err
