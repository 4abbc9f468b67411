"""What the objectives train on: the demo's own tasks, or the rows of a user."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

from ...datums import Datum, datum_from_prompt_completion, from_rows, preference_pair
from ...errors import ConfigError, PullbackError
from ..arguments.json_lines import numbered_lines
from .models import DemoModel
from .tasks import Pair, Split, Text, documentation, preferences, sum_prompts

__all__ = ["DemoData", "Question", "own_tasks", "rows_of_files"]

_QUESTION: Final = frozenset({"prompt", "answer"})
_OBJECTIVES: Final[Mapping[str, str]] = {"sft": "supervised", "dpo": "pairs", "orpo": "pairs", "grpo": "questions"}
_LONGEST: Final = 512  # tokens of a row
_HELD_OUT: Final = 40  # rows at most, and at most a fifth


@final
@dataclass(frozen=True)
class Question:
    """A prompt, and the reward of an answer: its text, and whether it ended by itself."""

    prompt: list[int]
    reward: Callable[[str, bool], float]


@final
@dataclass(frozen=True)
class DemoData:
    """Data by objective; None: there is none.

    Attributes:
        supervised: for SFT.
        pairs: for DPO and ORPO; a chosen and a rejected answer lie side by side.
        questions: for GRPO.
        max_new_tokens: of a sampled answer.
    """

    supervised: Split[Datum] | None = None
    pairs: Split[Datum] | None = None
    questions: Split[Question] | None = None
    max_new_tokens: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives that there is data for."""
        return tuple(name for name, kind in _OBJECTIVES.items() if getattr(self, kind) is not None)


def own_tasks(model: DemoModel, seed: int) -> DemoData:
    """Return the demo's tasks: Python's documentation, and sums of two numbers."""
    texts, pairs, sums = documentation(seed), preferences(seed, wrong_numbers=model.adds), sum_prompts(seed)

    def text(item: Text) -> list[Datum]:
        tokens = model.encode(item.completion)[: model.max_text_tokens]
        return [datum_from_prompt_completion(model.encode(model.chat(item.prompt)), tokens)]

    def pair(item: Pair) -> list[Datum]:
        chosen, rejected = (model.encode(answer + model.end) for answer in (item.chosen, item.rejected))
        return list(preference_pair(model.encode(model.chat(item.prompt)), chosen, rejected))

    return DemoData(
        Split(texts.train[:400], texts.held_out).map(text),
        Split(pairs.train[:200], pairs.held_out).map(pair),
        sums.map(lambda s: [Question(model.encode(model.example(s)), partial(model.reward, s))]),
        model.max_new_tokens,
    )


def rows_of_files(model: DemoModel, paths: Sequence[Path], seed: int, say: Callable[[str], None]) -> DemoData:
    """Return the rows of JSON Lines files, some of each held out.

    Rows of `from_rows` are for SFT, or for DPO and ORPO if they are pairs. Rows of ``prompt`` and ``answer`` are for GRPO: a
    sampled answer earns 1 if it is the answer, 0.5 if it contains it, else 0.

    Args:
        model: with a tokenizer.
        paths: files; each has rows of one format.
        seed: of the choice of held-out rows.
        say: is given a sentence about each file.

    Raises:
        ConfigError: the model has no tokenizer, a file cannot be read or has too few rows, or two are for the same objective.
        InvalidDatumsError: rows cannot be used.
    """
    if model.tokenizer is None:
        raise ConfigError(f"--data needs a model with a tokenizer, and {model.name} has none: give --model a folder")
    found: dict[str, Any] = {}
    for path in paths:
        rows = list(_rows(path))
        apart = _held_apart(rows, path, seed)
        made = _questions(model, apart) if _are_questions(rows, path) else _datums(model, rows, apart, path, say)
        if twice := sorted(set(made) & set(found)):
            raise ConfigError(f"{path}: there is data for {twice[0]} already; put all of its rows into one file")
        found |= made
    return DemoData(**{"max_new_tokens": model.max_new_tokens, **found})


def _datums(
    model: DemoModel, rows: list[Any], apart: Split[Any], path: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    read = partial(from_rows, tokenizer=model.tokenizer, max_length=_LONGEST, overlong="truncate")
    try:
        read(rows)  # what is wrong is told by the numbers that rows have in the file
        (train, report), (held_out, _) = read(apart.train), read(apart.held_out)
    except PullbackError as error:
        raise ConfigError(f"{path}: {error}") from error
    if report.kind == "unpaired_preference":
        raise ConfigError(
            f"{path}: rows with a label are for KTO, which is not among the demo's objectives, and SFT would train what is "
            "labelled undesirable too: keep the desirable rows, without the column 'label'"
        )
    say(f"{path}\ntraining: {report}\nheld out: {len(apart.held_out)} rows")
    return {"pairs" if report.kind == "preference" else "supervised": Split(train, held_out)}


def _are_questions(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    questions = [set(row) == _QUESTION for row in rows]
    if any(questions) and not all(questions):
        raise ConfigError(
            f"{path}: row {questions.index(False)} has other columns than prompt and answer, which the questions of this file "
            f"have: {', '.join(map(str, rows[questions.index(False)]))}"
        )
    return all(questions)


def _questions(model: DemoModel, rows: Split[Any]) -> dict[str, Any]:
    longest = max(len(model.encode(str(row["answer"]))) for row in (*rows.train, *rows.held_out))

    def question(row: Mapping[str, Any]) -> list[Question]:
        return [Question(model.encode(model.chat(str(row["prompt"]))), partial(_agreement, str(row["answer"]).strip()))]

    return {"questions": rows.map(question), "max_new_tokens": longest + 8}


def _agreement(answer: str, completion: str, ended: bool) -> float:
    if completion.strip() == answer:
        return 1.0 if ended else 0.5
    return 0.5 if answer in completion else 0.0


def _held_apart(rows: list[Mapping[str, Any]], path: Path, seed: int) -> Split[Mapping[str, Any]]:
    if len(rows) < 5:
        raise ConfigError(f"{path} has {len(rows)} rows; at least 5 are needed, because some of them are held out")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    held_out = min(_HELD_OUT, len(rows) // 5)
    return Split(shuffled[held_out:], shuffled[:held_out])


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: each line is a row in JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: a row is a JSON object, got {type(row).__name__}")
        yield row
