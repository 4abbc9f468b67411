"""`pullback explain`: the datums of a file as tables, and what it says of a file of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pullback.cli import main


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each datum of a file is a table; without weights they are said to be 1."""
    file = tmp_path / "datums.jsonl"
    lines = [
        {"model_input": [1, 2]},
        {"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 3], "weights": [0, 1]}},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["explain", str(file)]) == 0
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert first.splitlines()[-1].split() == ["0", "|", "1", "|", "2", "|", "1", "(default)"]
    assert second.splitlines()[-1].split() == ["1", "|", "2", "|", "3", "|", "1"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            '{"messages": []}',
            ["got the keys messages.", "rows = [json.loads(line) for line in open(", "from_rows(rows, tokenizer)"],
        ),
        ("[1, 2]", ["got list"]),
        ('{"model_input": [1,', ["which is no JSON"]),
        ('{"model_input": [1.5]}', ["integers"]),
        ('{"model_input": 3}', ["got '{\"model_input\": 3}'"]),
        ('{"model_input": [1], "loss_fn_inputs": [2]}', ["must be a mapping"]),
    ],
)
def test_what_is_no_datum(line: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of something else is named with the file and what is expected; of a row of a data set, how it is read."""
    file = tmp_path / "chats.jsonl"
    file.write_text('{"model_input": [1, 2]}\n' + line)
    assert main(["explain", str(file)]) == 2
    told = capsys.readouterr().err
    for word in (f"{file}, line 2: a line is ", '"model_input": [...]', *words):
        assert word in told
    assert "Error" not in told.replace("ConfigError", "")
