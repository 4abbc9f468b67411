"""The demo on a user's model and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pretrained.folders import chat_folder

from pullback.cli import main
from pullback.cli.demo.backends import native
from pullback.cli.demo.data import DemoData, rows_of_files
from pullback.cli.demo.models import DemoModel, pretrained, tiny
from pullback.cli.demo.objectives import batches
from pullback.cli.demo.tasks import Sum
from pullback.errors import ConfigError
from pullback.testing.models.zoo import build

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Rows = Sequence[Mapping[str, Any]]
CHATS: Rows = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]} for i in range(10)
]
PAIRS: Rows = [{"prompt": f"{i}? ", "chosen": str(i), "rejected": "no"} for i in range(10)]
QUESTIONS: Rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = chat_folder(tmp_path / "model")
    (made / "chat_template.jinja").write_text(_TEMPLATE)
    return made


def written(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(model: DemoModel, *paths: Path, seed: int = 0) -> DemoData:
    return rows_of_files(model, paths, seed, lambda sentence: None)


def test_rows_decide_the_objectives(folder: Path, tmp_path: Path) -> None:
    """Chats are for SFT, pairs for DPO and ORPO, questions for GRPO; a fifth is held out, and nothing is on both sides."""
    model = pretrained(str(folder), "cpu", "float32")
    chats, pairs, questions = (
        written(tmp_path / name, rows) for name, rows in (("chats", CHATS), ("pairs", PAIRS), ("questions", QUESTIONS))
    )
    assert read(model, chats).names == ("sft",)
    data = read(model, pairs, questions)
    assert data.names == ("dpo", "orpo", "grpo")
    assert data.pairs is not None
    assert data.questions is not None
    assert (len(data.pairs.train), len(data.pairs.held_out)) == (16, 4), "two datums a pair"
    held_out = {tuple(question.prompt) for question in data.questions.held_out}
    assert len(held_out) == 2
    assert held_out.isdisjoint(tuple(question.prompt) for question in data.questions.train)


def test_the_reward_of_an_answer(folder: Path, tmp_path: Path) -> None:
    """1 for the answer and its end, 0.5 for an answer in other words or without an end, 0 for another one."""
    model = pretrained(str(folder), "cpu", "float32")
    data = read(model, written(tmp_path / "rows", [{"prompt": "one?", "answer": "yes"}] * 5))
    assert data.questions is not None
    reward = data.questions.train[0].reward
    assert [reward(" yes", True), reward("yes", False), reward("yes, two", True), reward("no", True)] == [
        1,
        0.5,
        0.5,
        0,
    ]


def test_answers_end_as_the_template_ends_them(folder: Path) -> None:
    """An answer ends with the token of its turn, be it the end of a text or not; a solved example is a turn, and no text."""
    model = pretrained(str(folder), "cpu", "float32")
    assert model.end == "<|im_end|>"
    assert model.example(Sum(1, 2)) == (
        "<|im_start|>user\nWhat is 2 + 6?<|im_end|>\n<|im_start|>assistant\n<answer>8</answer><|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + _TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
    other = pretrained(str(folder), "cpu", "float32")
    assert other.end == "<|endoftext|>" != other.tokenizer.eos_token
    assert other.example(Sum(1, 2)).startswith("<|im_start|><|im_start|>user")
    assert other.example(Sum(1, 2)).count("<|im_start|><|im_start|>") == 1


@pytest.mark.parametrize(
    ("kind", "adapted"),
    [("llama", {"q_proj", "v_proj"}), ("qwen3_moe", {"q_proj", "v_proj"}), ("phi3", {"qkv_proj", "o_proj"}),
     ("gpt2", {"c_attn", "c_proj"}), ("falcon", {"query_key_value", "dense"})],
)  # fmt: skip
def test_the_adapter_fits_models_of_any_names(kind: str, adapted: set[str], folder: Path) -> None:
    """Query and value projections where a model has them apart, else all of its attention, and nothing else."""
    build(kind, vocab_size=259).save_pretrained(folder)
    model = pretrained(str(folder), "cpu", "float32")
    paths = [path for path, part in native(model).model.named_modules() if path.endswith("lora_A")]
    assert {path.split(".")[-2] for path in paths} == adapted
    assert [path for path in paths if "mlp" in path] == []


def test_lines_end_at_line_feeds_alone(folder: Path, tmp_path: Path) -> None:
    """A text may hold other separators of lines; a mark of the byte order, returns and blank lines are no rows."""
    rows = [json.dumps({"text": f"{i}a\u2028b\x85c"}, ensure_ascii=False) for i in range(6)]
    (tmp_path / "texts").write_bytes(("\ufeff" + "\r\n\n".join(rows) + "\n\n").encode())
    data = read(pretrained(str(folder), "cpu", "float32"), tmp_path / "texts")
    assert data.supervised is not None
    assert (len(data.supervised.train), len(data.supervised.held_out)) == (5, 1)


def test_few_pairs_stand_in_a_batch_once() -> None:
    """A batch has at most all items, in order and from the beginning again; a pair that stands there twice is refused."""
    made = batches(list(range(6)), 16)
    assert [next(made), next(made)] == [list(range(6))] * 2
    made = batches(list(range(6)), 4)
    assert [next(made), next(made)] == [[0, 1, 2, 3], [4, 5, 0, 1]]


def test_what_cannot_be_used_is_refused(folder: Path, tmp_path: Path) -> None:
    """Each sentence names the file and what is wrong with it."""
    model = pretrained(str(folder), "cpu", "float32")
    first, second = written(tmp_path / "a", PAIRS), written(tmp_path / "b", PAIRS)
    few, other = (
        written(tmp_path / "few", PAIRS[:4]),
        written(tmp_path / "other", [{"instruction": "x", "output": "y"}] * 5),
    )
    (tmp_path / "text").write_text("not JSON\n")
    (tmp_path / "latin").write_bytes('{"text": "é"}'.encode("latin-1"))
    labelled = written(tmp_path / "kto", [{"prompt": "a", "completion": "b", "label": i % 2 == 0} for i in range(5)])
    mixed = [written(tmp_path / f"mixed{i}", [*PAIRS, other]) for i, other in enumerate((CHATS[0], QUESTIONS[0]))]
    bad = written(tmp_path / "bad", [*CHATS, {"messages": []}])
    for paths, words in (
        ((first, second), "b: there is data for pairs already"),
        ((few,), "few has 4 rows; at least 5"),
        ((other,), "rename instruction"),
        ((tmp_path / "text",), "text, line 1: each line is a row in JSON"),
        ((tmp_path / "nowhere",), "cannot read"),
        ((tmp_path / "latin",), "as UTF-8"),
        ((labelled,), "kto: rows with a label are for KTO"),
        ((mixed[0],), "row 10: is of kind 'messages', but the rows before it are of kind 'preference'"),
        ((mixed[1],), "row 0 has other columns than prompt and answer.*: prompt, chosen, rejected"),
        ((bad,), "row 10: messages is empty"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(model, *paths)
    with pytest.raises(ConfigError, match="needs a model with a tokenizer"):
        read(tiny("cpu"), first)


def test_the_command_on_a_users_model_and_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo trains on the rows, and says what it read of them; an objective without data is refused."""
    pairs = written(tmp_path / "pairs", PAIRS)
    command = [
        "demo",
        "--model",
        str(folder),
        "--data",
        str(pairs),
        "--device",
        "cpu",
        "--minutes",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main([*command, "--only", "dpo"]) == 0
    printed = capsys.readouterr().out
    assert "training: 8 rows of kind preference: 16 datums" in printed
    assert "held out: 2 rows" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["objectives"][0]["points"][-1]["margin"] > 0
    assert main([*command, "--only", "grpo"]) == 2
    assert "there is no data for grpo, only for dpo, orpo" in capsys.readouterr().err
