"""`check_builder`: does a builder of training examples train the answers, their ends, and nothing else?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from ...datums.types import Datum
from ...datums.validation import validate
from ...losses.batch.labels import IGNORED
from ...losses.checks import choice
from .example import BuiltExample, built_example
from .regions import Regions
from .rows import BUILDER_ROWS, Built, Messages, call_of

__all__ = ["DataRow", "check_builder"]

_CHATS: Final[tuple[Messages, ...]] = (
    (
        {"role": "system", "content": "Be brief and exact."},
        {"role": "user", "content": "Which number follows seven?"},
        {"role": "assistant", "content": "Eight follows it."},
    ),
    (
        {"role": "user", "content": "Name a river in Africa."},
        {"role": "assistant", "content": "The Nile flows there."},
        {"role": "user", "content": "And in South America?"},
        {"role": "assistant", "content": "There it is the Amazon."},
    ),
)


@final
@dataclass(frozen=True)
class DataRow:
    """One line of the table.

    Attributes:
        name: what was checked.
        verdict: ``right``, ``wrong`` or ``not applicable``.
        reason: what was found, with the likely cause.
        example: the tokens, ``*`` before those that are trained.
    """

    name: str
    verdict: Literal["right", "wrong", "not applicable"]
    reason: str = ""
    example: str = ""


def check_builder(
    build: Callable[..., Any],
    tokenizer: Any,
    chats: Sequence[Messages] = _CHATS,
    *,
    only: str | Sequence[str] | None = None,
) -> list[DataRow]:
    """Check what a builder makes of chats.

    A builder that trains the last answer only is right too. Characters beyond ASCII may be several tokens, so that their
    places cannot be told: give chats in ASCII.

    Args:
        build: from messages to a `Datum`, or to a mapping with ``input_ids`` and ``labels`` (or a mask). An argument called
            ``tokenizer`` is given; one called ``example`` or ``row`` gets ``{"messages": ...}``; with one called
            ``max_length`` truncation is checked too.
        tokenizer: has ``apply_chat_template``, ``decode``, and is callable.
        chats: lists of messages, each of which ends with an answer of the assistant.
        only: names of rows; absent: all.

    Returns:
        A row for each check. If nothing can be built, that row alone.

    Raises:
        ConfigError: the builder's arguments stand for nothing known, or a row's name is unknown.
    """
    names = [only] if isinstance(only, str) else list(only or BUILDER_ROWS)
    for name in names:
        choice("row", name, BUILDER_ROWS)
    built = []
    for messages in chats:
        call = call_of(build, tokenizer, messages)
        try:
            example = _valid(call())
            built.append(Built(build, tokenizer, messages, example, Regions.of(tokenizer, example.tokens, messages)))
        except Exception as error:  # whatever a builder raises
            return [DataRow("builds", "wrong", f"{type(error).__name__}: {error}")]
    return [_row(name, built) for name in names]


def _row(name: str, built: Sequence[Built]) -> DataRow:
    for one in built:
        found = BUILDER_ROWS[name](one)
        if found is not None:
            return DataRow(name, "wrong", found, one.regions.marked(one.example.trained))
    if name == "truncation" and "max_length" not in inspect.signature(built[0].build).parameters:
        return DataRow(name, "not applicable", "the builder takes no max_length")
    return DataRow(name, "right")


def _valid(returned: Any) -> BuiltExample:
    if isinstance(returned, Datum):
        validate([_without_labels(returned)])
    return built_example(returned)


def _without_labels(datum: Datum) -> Datum:
    """Return the datum with weights of 0 in the place of -100, for which there is a row."""
    if "weights" not in datum.loss_fn_inputs:
        return datum
    weights = datum.loss_fn_inputs["weights"].to_torch()
    return datum.with_inputs(weights=weights.where(weights != IGNORED, 0.0))
