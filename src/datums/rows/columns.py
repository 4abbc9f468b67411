"""Which format a row has, by its columns; and columns that nobody may ignore."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, final

from ...errors import DatumError, suggestion

__all__ = ["FORMATS", "Kind", "RowKind", "check_kind", "kind_of", "present", "unused_columns"]

RowKind: TypeAlias = Literal["messages", "prompt_completion", "preference", "unpaired_preference", "text", "tokens"]
Kind: TypeAlias = RowKind | Literal["auto"]

_CHAT: Final = ("tools", "chat_template_kwargs")
_MASKS: Final = ("labels", "completion_mask", "assistant_masks")
_SEVERAL: Final = ("position_ids", "seq_lengths")  # by which a packed row says where its sequences begin
# what says how much, or whether, or with what else a row is trained
_MATTERS: Final = {
    *(
        "mask",
        "loss_mask",
        "train_mask",
        "assistant_mask",
        "train",
        "weight",
        "weights",
        "sample_weight",
        "sample_weights",
        "token_weights",
        "loss_weight",
        "loss_weights",
        "response_mask",
    ),
    *("label", "advantage", "advantages", "logprobs", "old_logprobs", "ref_logprobs", "system"),
    *("image", "images", "audio", "audios", "video", "videos", *_CHAT, *_MASKS),
}
_ELSEWHERE: Final = {
    frozenset({"chosen"}): "it has 'chosen' but no 'rejected': give both, or rename chosen to completion",
    frozenset({"rejected"}): "it has 'rejected' but no 'chosen': a preference needs both",
    frozenset({"instruction", "output"}): "rename instruction (with input) to prompt and output to completion",
    frozenset({"question", "answer"}): "rename question to prompt and answer to completion",
    frozenset({"prompt", "response"}): "rename response to completion",
    frozenset({"input_ids"}): "add labels, -100 where a token is not trained",
    frozenset({"prompt"}): "prompts alone are for sampling: there is nothing to train on",
}


@final
@dataclass(frozen=True)
class Format:
    """The columns of a format.

    Attributes:
        required: each is a column, or several of which at least one is there.
        optional: read where they are there.
    """

    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> frozenset[str]:
        """All columns that are read."""
        return frozenset(name for names in self.required for name in names) | frozenset(self.optional)

    def fits(self, columns: Collection[str]) -> bool:
        """Whether a row has what is required."""
        return all(any(name in columns for name in names) for names in self.required)


FORMATS: Final[dict[RowKind, Format]] = {
    "messages": Format((("messages", "conversations"),), _CHAT),
    "prompt_completion": Format((("prompt",), ("completion",)), _CHAT),
    "preference": Format((("chosen",), ("rejected",)), ("prompt", *_CHAT)),
    "unpaired_preference": Format((("prompt",), ("completion",), ("label",)), _CHAT),
    "text": Format((("text",),)),
    "tokens": Format((("input_ids",), _MASKS), ("attention_mask", *_SEVERAL)),
}


def present(row: Mapping[str, Any], ignore: Collection[str] = ()) -> dict[str, Any]:
    """Return the columns of a row that hold something; tables fill in None where a row has no such column."""
    return {str(name): value for name, value in row.items() if value is not None and name not in ignore}


def check_kind(kind: str) -> None:
    """Check the name of a format.

    Raises:
        DatumError: there is none of that name.
    """
    if kind != "auto" and kind not in FORMATS:
        raise DatumError(f"unknown kind {kind!r}{suggestion(kind, FORMATS)}; known are auto, {', '.join(FORMATS)}")


def kind_of(columns: Collection[str], kind: Kind = "auto") -> RowKind:
    """Return the format of a row.

    Args:
        columns: those that hold something.
        kind: the format that it must have; ``auto``: the only one whose columns are there.

    Raises:
        DatumError: it has not that format, none, or more than one.
    """
    if kind != "auto":
        if not FORMATS[kind].fits(columns):
            raise DatumError(f"is not of kind {kind!r}, which has {_needs(kind)}; it has {_listed(columns)}")
        return kind
    fitting = [name for name, form in FORMATS.items() if form.fits(columns)]
    if "unpaired_preference" in fitting and "prompt_completion" in fitting:
        fitting.remove("prompt_completion")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DatumError(f"may be read as {' or as '.join(fitting)} ({_listed(columns)}); say which by kind=")
    hint = next((f"; {hint}" for names, hint in _ELSEWHERE.items() if names <= set(columns)), "")
    known = {name for form in FORMATS.values() for names in form.required for name in names}
    close = "".join(suggestion(name, known) for name in columns if name not in known)
    raise DatumError(f"has no known format: its columns are {_listed(columns)}{close}{hint}")


def unused_columns(columns: Collection[str], kind: RowKind) -> Iterator[str]:
    """Yield the columns that are not read.

    Raises:
        DatumError: one of them would change what is trained.
    """
    for name in columns:
        if name in FORMATS[kind].columns:
            continue
        if name in _MATTERS:
            raise DatumError(
                f"column {name!r} would change what is trained, but rows of kind {kind!r} have no use for it; "
                f"leave it out knowingly by ignore=({name!r},)"
            )
        yield name


def _needs(kind: RowKind) -> str:
    return ", ".join(" or ".join(names) for names in FORMATS[kind].required)


def _listed(columns: Collection[str]) -> str:
    return ", ".join(columns) or "empty"
