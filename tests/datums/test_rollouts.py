"""What a sampler drew becomes one datum: drawn tokens are trained with their own numbers, all else is context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.datums import (
    Turn,
    datum_from_rollout,
    datum_from_turns,
    turn_from_sglang,
    turns_from_vllm,
    validate,
)
from pullback.errors import DatumError, LengthError

TOKENS = st.lists(st.integers(0, 20), min_size=1, max_size=4)


@st.composite
def episodes(draw: st.DrawFn) -> tuple[list[Turn], list[tuple[int, float | None]]]:
    """Turns, and of each token of the episode the log-prob that it was drawn with, None where it was not drawn."""
    turns: list[Turn] = []
    told: list[tuple[int, float | None]] = []
    for _ in range(draw(st.integers(1, 3))):
        told += [(token, None) for token in draw(TOKENS)]
        tokens = draw(TOKENS)
        logprobs = [-draw(st.floats(0, 9, width=16)) for _ in tokens]
        turns.append(Turn([token for token, _ in told], tokens, logprobs))
        told += list(zip(tokens, logprobs, strict=True))
    return turns, told


@given(episode=episodes(), per_turn=st.booleans())
def test_turns(episode: tuple[list[Turn], list[tuple[int, float | None]]], per_turn: bool) -> None:
    """Each drawn token has its own log-prob and its turn's advantage; a tool's answer between turns has weight 0."""
    turns, told = episode
    advantages = [float(number + 1) if per_turn else 0.5 for number in range(len(turns))]
    datum = datum_from_turns(turns, advantages if per_turn else 0.5, group_id=2)
    expected = [advantage for turn, advantage in zip(turns, advantages, strict=True) for _ in list(turn.tokens)]
    inputs = datum.loss_fn_inputs
    assert [datum.model_input.to_ints()[0], *inputs["target_tokens"].data] == [token for token, _ in told]
    assert inputs["weights"].data == [float(value is not None) for _, value in told[1:]]
    assert inputs["logprobs"].data == [value or 0.0 for _, value in told[1:]]
    assert [a for a, w in zip(inputs["advantages"].data, inputs["weights"].data, strict=True) if w] == expected
    validate([datum], required=("target_tokens", "weights", "advantages", "logprobs"), known_keys=True)


@given(prompt=TOKENS, tokens=TOKENS)
def test_one_turn_is_a_rollout(prompt: list[int], tokens: list[int]) -> None:
    """A single turn is what datum_from_rollout makes of it; advantages may be one per token."""
    logprobs = [-1.0 - j for j in range(len(tokens))]
    advantages = torch.arange(len(tokens), dtype=torch.float32)
    options: dict[str, Any] = {"temperature": 0.7, "logprobs_of": "sampler", "weights_version": 4}
    one = datum_from_turns([Turn(prompt, tokens, logprobs)], [advantages], **options)
    assert one == datum_from_rollout(prompt, tokens, logprobs, advantages, **options)
    scalar = datum_from_turns([Turn(prompt, tokens, logprobs)], torch.tensor(2.0))
    assert scalar == datum_from_rollout(prompt, tokens, logprobs, 2.0)


@pytest.mark.parametrize("made", [list, tuple, np.array, torch.tensor, iter])
def test_advantages_of_turns_in_any_container(made: Any) -> None:
    """One entry per turn is that in whatever holds it, also where turns have as many tokens as there are turns."""
    turns = [Turn([1], [2, 3], [-1.0, -1.0]), Turn([1, 2, 3, 4], [5, 6], [-1.0, -1.0])]
    assert datum_from_turns(turns, made([10.0, 20.0])).loss_fn_inputs["advantages"].data == [10, 10, 0, 20, 20]
    scalars: list[Any] = [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)]
    for one in scalars:
        assert datum_from_turns(turns, one).loss_fn_inputs["advantages"].data == [0.5, 0.5, 0, 0.5, 0.5]


def vllm(completions: list[Any]) -> Any:
    """A ``RequestOutput`` by the names of its attributes."""
    return SimpleNamespace(prompt_token_ids=(1, 2), outputs=completions)


def test_vllm() -> None:
    """Of each position's log-probs the drawn token's is taken, whatever others are there and whichever is most probable."""
    positions = [
        {9: SimpleNamespace(logprob=-0.1), 5: SimpleNamespace(logprob=-2.0)},
        {6: SimpleNamespace(logprob=-0.5)},
    ]
    first = SimpleNamespace(token_ids=(5, 6), logprobs=positions)
    second = SimpleNamespace(token_ids=[7], logprobs=[-0.25])
    turns = turns_from_vllm(vllm([first, second]))
    assert turns == [Turn([1, 2], [5, 6], [-2.0, -0.5]), Turn([1, 2], [7], [-0.25])]
    datum = datum_from_turns(turns[:1], 1.0)
    assert datum.loss_fn_inputs["logprobs"].data == [0.0, -2.0, -0.5]
    for completion, reason in (
        (SimpleNamespace(token_ids=[5], logprobs=None), "completion 0 has no logprobs"),
        (
            SimpleNamespace(token_ids=[5], logprobs=[{6: -1.0}]),
            "completion 0 token 0: .* no entry of the drawn token 5",
        ),
        (SimpleNamespace(token_ids=[5, 6], logprobs=[{5: -1.0}]), "has 2 tokens, but 1 log-probs"),
        (SimpleNamespace(token_ids=[5, 6], logprobs=[-1.0, None]), "completion 0 token 1: .* of the drawn token 6"),
        (
            SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=None)}]),
            "completion 0 token 0: .* no entry of the drawn token 5",
        ),
    ):
        with pytest.raises(DatumError, match=reason):
            turns_from_vllm(vllm([completion]))
    with pytest.raises(DatumError, match="no prompt_token_ids"):
        turns_from_vllm(SimpleNamespace(prompt_token_ids=None, outputs=[]))


def test_sglang() -> None:
    """Tokens and log-probs are those of the response; one that was asked for neither is refused."""
    response = {
        "text": "x",
        "output_ids": [5, 6],
        "meta_info": {"output_token_logprobs": [(-2.0, 5, None), [-0.5, 6, "x"]]},
    }
    assert turn_from_sglang(response, [1, 2]) == Turn([1, 2], [5, 6], [-2.0, -0.5])
    with pytest.raises(DatumError, match="return_logprob=True"):
        turn_from_sglang({"text": "x", "meta_info": {}}, [1])
    with pytest.raises(DatumError, match="are not the tokens"):
        turn_from_sglang({**response, "output_ids": [5]}, [1])
    with pytest.raises(DatumError, match="token 1 of the response has no log-prob"):
        turn_from_sglang({"meta_info": {"output_token_logprobs": [(-2.0, 5, None), (None, 6, None)]}}, [1])


FIRST = Turn([1, 2], [3, 4], [-1.0, -1.0])


@pytest.mark.parametrize(
    ("turns", "advantage", "reason"),
    [
        ([], 1.0, "at least one Turn"),
        (
            [FIRST, Turn([1, 2, 3, 5, 6], [7], [-1.0])],
            1.0,
            r"turn 1: .* from token 3 on it has \[5, 6\], and not \[4\]",
        ),
        ([FIRST, Turn([1, 2, 3], [7], [-1.0])], 1.0, r"turn 1: .* from token 3 on it has \[\], and not \[4\]"),
        ([FIRST, Turn([1, 2, 3, 4], [], [])], 1.0, "turn 1: prompt .4 tokens. and completion .0."),
        ([FIRST, Turn([1, 2, 3, 4], [5], [])], 1.0, "turn 1: logprobs has shape"),
        ([FIRST], [1.0, 2.0], "advantage has 2 entries, but there are 1 turns"),
        ([FIRST], [[1.0, 2.0, 3.0]], "advantages has shape .3,., but the completion has 2 tokens"),
        ([FIRST, Turn([1, 2, 3, 4, 5], [6, 7], [-1.0, None])], 1.0, r"turn 1: logprobs\[1\] is None"),  # type: ignore[list-item]
        ([FIRST], ["high"], "advantages are no numbers"),
    ],
)
def test_turns_that_do_not_fit(turns: list[Turn], advantage: Any, reason: str) -> None:
    """A prompt that is not what came before, and numbers that are not one per token, are refused with turn and token."""
    with pytest.raises(DatumError, match=reason) as caught:
        datum_from_turns(turns, advantage)
    assert isinstance(caught.value, LengthError) == ("has shape" in reason or "entries" in reason)


def test_sampling_is_checked() -> None:
    """Turns drawn at another temperature, or from a cut distribution, are held to what a rollout is held to."""
    with pytest.raises(DatumError, match="every ratio would be wrong"):
        datum_from_turns([FIRST], 1.0, temperature=0.5)
    with pytest.warns(UserWarning, match="had no chance") as caught:
        datum_from_turns([FIRST], 1.0, top_p=0.9)
    assert caught[0].filename == __file__
