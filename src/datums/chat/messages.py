"""Chat messages as they are given: checked, with one weight for each, and without what only says what is trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias, final

from ...errors import DatumError, suggestion
from .roles import ASSISTANT, is_assistant_in_other_words

__all__ = ["REASONING_KEYS", "Chat", "Messages", "Turns", "read_chat"]

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Turns: TypeAlias = Literal["all", "last"]

REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_KEYS: Final = ("weight", "train")
# keys by which other tools say what is trained, and which no template reads
_FOREIGN_WEIGHT_KEYS: Final = (
    *("loss", "loss_mask", "loss_weight", "mask", "masked"),
    *("trainable", "training", "train_detail", "training_detail", "weights"),
)
_OURS: Final = ("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "return_dict")
_RESERVED: Final = (
    *_OURS,
    "conversation",
    "max_length",
    "padding",
    "return_tensors",
    "tokenize",
    "tools",
    "truncation",
)


@final
@dataclass(frozen=True)
class Chat:
    """A chat that is ready for a template.

    Attributes:
        messages: as the template is given them.
        weights: one per message; 0 = not trained.
        tools: schemas or functions, for the template.
        arguments: further arguments of the template.
    """

    messages: tuple[Mapping[str, Any], ...]
    weights: tuple[float, ...]
    tools: Sequence[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def variant(self) -> tuple[bool, str]:
        """What of a chat, beside its messages, changes how a template writes it: one value for each way."""
        return self.tools is not None, repr(sorted(self.arguments.items()))

    @cached_property
    def trained(self) -> list[int]:
        """The messages that are trained."""
        return [i for i, weight in enumerate(self.weights) if weight != 0]

    def untrained_before(self, first: int) -> Chat:
        """Return the chat with the messages before ``first`` not trained."""
        return replace(self, weights=(0.0,) * first + self.weights[first:])

    def last_only(self) -> Chat:
        """Return the chat with its last trained message alone trained."""
        return self.untrained_before(self.trained[-1]) if self.trained else self


def read_chat(
    messages: Messages,
    train_on: str | Collection[str] = "assistant",
    tools: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Chat:
    """Check messages, and read what is trained of them.

    Args:
        messages: dicts with ``role`` and ``content``; ``weight`` (a number) or ``train`` (a bool) say of a message whether
            it is trained, 1 where neither is given.
        train_on: role or roles that are trained.
        tools: for the template.
        arguments: for the template.

    Raises:
        DatumError: a message is no message, holds something else than text, or is weighted in a way that is not understood.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise DatumError(f"messages must be a list of dicts with role and content, got {type(messages).__name__}")
    if not messages:
        raise DatumError("messages is empty; give at least one message")
    roles = frozenset([train_on] if isinstance(train_on, str) else train_on)
    weights = []
    for i, message in enumerate(messages):
        _check_message(i, message)
        weights.append(_weight_of(i, message, roles))
    _check_arguments(arguments or {})
    kept = tuple({k: v for k, v in message.items() if k not in _WEIGHT_KEYS} for message in messages)
    return Chat(kept, tuple(weights), list(tools) if tools else None, dict(arguments or {}))


def _check_message(i: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise DatumError(f"message {i} must be a dict with role and content, got {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        hint = "; a 'from'/'value' message is read by from_rows" if "from" in message else ""
        raise DatumError(f"message {i} has no role (keys: {', '.join(map(str, message))}){hint}")
    for key in _FOREIGN_WEIGHT_KEYS:
        if message.get(key) is not None:
            raise DatumError(
                f"message {i} has {key!r}, which would be ignored; say by 'weight' (a number) or 'train' (a bool) whether it "
                "is trained"
            )
    content = message.get("content")
    if content is None:
        if not any(message.get(key) for key in ("tool_calls", *REASONING_KEYS)):
            raise DatumError(f"message {i} ({message['role']}) has no content and no tool calls{_close(message)}")
    elif isinstance(content, (list, tuple)):
        for part in content:
            _check_part(i, part)
    elif not isinstance(content, str):
        raise DatumError(f"message {i}: content must be text, a list of parts or None, got {type(content).__name__}")


def _close(message: Mapping[str, Any]) -> str:
    close = [key for key in message if key != "content" and suggestion(str(key), ["content"])]
    return f"; its key {close[0]!r} is not read (did you mean 'content'?)" if close else ""


def _check_part(i: int, part: Any) -> None:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DatumError(f"message {i}: content has a part of type {kind!r}; only text can be trained on")


def _weight_of(i: int, message: Mapping[str, Any], roles: frozenset[str]) -> float:
    weight, train = (message.get(key) for key in _WEIGHT_KEYS)
    if weight is not None and train is not None:
        raise DatumError(f"message {i} has both 'weight' ({weight!r}) and 'train' ({train!r}); give one of them")
    given = train if weight is None else weight
    if train is not None and not isinstance(train, bool):
        raise DatumError(f"message {i}: 'train' must be True or False, got {train!r}; 'weight' takes numbers")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0
    ):
        raise DatumError(f"message {i}: 'weight' must be a finite number, 0 or above, got {weight!r}")
    if message["role"] in roles:
        return 1.0 if given is None else float(given)
    if given is None or given:
        _check_role(i, message["role"], roles)
    if given:
        raise DatumError(
            f"message {i} ({message['role']}) asks to be trained, but trained are the turns of {', '.join(sorted(roles))}; "
            f"name its role in train_on, or leave its {'train' if weight is None else 'weight'!r} out"
        )
    return 0.0


def _check_role(i: int, role: str, trained: frozenset[str]) -> None:
    if ASSISTANT in trained and is_assistant_in_other_words(role):
        raise DatumError(
            f"message {i} has the role {role!r}: did you mean {ASSISTANT!r}? its turn would not be trained; if the template "
            "knows this role, name it in train_on to train it, or give the message 'train': False"
        )


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    taken = [key for key in arguments if key in _RESERVED]
    if taken:
        raise DatumError(f"chat_template_kwargs has {', '.join(map(repr, taken))}, which the builder sets itself")
