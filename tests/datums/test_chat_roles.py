"""The assistant under another name is refused, and turns that are not trained are named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pretrained.chat_templates import CHATML
from pretrained.chat_tokenizer import chat_tokenizer

from pullback.datums import datum_from_messages, from_rows
from pullback.datums.chat.roles import ROLE_OF, is_assistant_in_other_words
from pullback.errors import DatumError, InvalidDatumsError

USER, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes"}
OTHER_NAMES = (
    "Assistant",
    "ASSISTANT",
    " assistant",
    "asistant",
    "assitant",
    "assistent",
    "assistants",
    "model",
    "Bot",
    "gpt",
)
OTHER_ROLES = (
    "system",
    "user",
    "User",
    "tool",
    "Developer",
    "ipython",
    "function",
    "environment",
    "critic",
    "context",
    "",
)


@pytest.mark.parametrize("role", [*OTHER_NAMES, "AI"])
def test_the_assistant_under_another_name(role: str) -> None:
    """One turn of such a role among others is refused by both ways to datums, with what was probably meant."""
    messages = [USER, {"role": role, "content": "No"}, USER, YES]
    words = f"message 1 has the role '{role}': did you mean 'assistant'\\? its turn would not be trained"
    with pytest.raises(DatumError, match=words):
        datum_from_messages(chat_tokenizer(CHATML), messages)
    with pytest.raises(InvalidDatumsError, match=f"row 0: {words}"):
        from_rows([{"messages": messages}], chat_tokenizer(CHATML))


def test_what_is_said_of_such_a_role_is_heard() -> None:
    """Named in `train_on`, or with `train` of False, it is as any other role; also where the assistant is not trained."""
    messages = [USER, {"role": "model", "content": "No"}, USER, YES]
    tokenizer = chat_tokenizer(CHATML)

    def trained(messages: list[Any], train_on: tuple[str, ...]) -> list[bool]:
        datum = datum_from_messages(tokenizer, messages, train_on)
        text = tokenizer.decode(
            [
                t
                for t, w in zip(*(datum.loss_fn_inputs[k].tolist() for k in ("target_tokens", "weights")), strict=True)
                if w
            ]
        )
        return [word in text for word in ("No", "Yes", "hi")]

    assert trained(messages, ("assistant", "model")) == [True, True, False]
    assert trained(messages, ("model",)) == [True, False, False]
    assert trained(messages, ("user",)) == [False, False, True]
    assert trained([USER, {**messages[1], "train": False}, USER, YES], ("assistant",)) == [False, True, False]
    with pytest.raises(DatumError, match="did you mean 'assistant'"):
        trained([USER, {**messages[1], "train": True}, USER, YES], ("assistant",))


@given(st.sampled_from(OTHER_ROLES) | st.text("bcdefghlmnopqru_ ", max_size=12))
def test_other_roles_are_left_alone(role: str) -> None:
    """Neither the usual roles nor those of some template are taken for the assistant."""
    assert not is_assistant_in_other_words(role) or ROLE_OF.get(role.strip().lower()) == "assistant"
    assert not is_assistant_in_other_words("assistant")


def test_the_report_names_roles_that_are_not_trained() -> None:
    """A role that only a template may know is in the report, once; those that nobody trains, and the trained ones, are not."""
    usual = [{"role": role, "content": "a"} for role in ("system", "developer", "tool")]
    rows = [{"messages": [*usual, USER, YES]}, {"messages": [USER, YES, {"role": "ipython", "content": "b"}, YES]}]
    _, report = from_rows(rows[:1], chat_tokenizer(CHATML))
    assert (report.untrained_roles, "not trained" in str(report)) == ((), False)
    _, report = from_rows([*rows, rows[1]], chat_tokenizer(CHATML))
    assert str(report).splitlines()[-1] == "roles whose turns are not trained: 'ipython'"
    _, report = from_rows(rows, chat_tokenizer(CHATML), train_on=("assistant", "ipython"))
    assert report.untrained_roles == ()


@pytest.mark.parametrize("sender", [name for name, role in ROLE_OF.items() if role == "assistant"])
def test_senders(sender: str) -> None:
    """Each name that stands for the assistant as a sender is trained there, and as a role is told to be no role."""
    shared = [{"from": "human", "value": "hi"}, {"from": sender, "value": "Yes"}]
    data, _ = from_rows([{"conversations": shared}], chat_tokenizer(CHATML))
    assert data == [datum_from_messages(chat_tokenizer(CHATML), [USER, YES])]
    assert is_assistant_in_other_words(sender) == (sender != "assistant")
