"""Datums: builders align, validation reports everything, conversion loses nothing."""

from __future__ import annotations

from typing import Any

import pytest
import tinker
import torch
from helpers import make_data
from hypothesis import given
from hypothesis import strategies as st

from pullback.datums import (
    Datum,
    ModelInput,
    TensorData,
    datum_from_messages,
    datum_from_prompt_completion,
    datum_from_rollout,
    datum_from_spans,
    datum_from_tokens_weights,
    from_rows,
    from_tinker,
    preference_pair,
    to_tinker,
    validate,
)
from pullback.errors import DatumError, InvalidDatumsError, LengthError
from pullback.losses import get_loss, loss_names

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=6)


def columns(datum: Datum) -> tuple[list[int], Any, Any]:
    return datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].data, datum.loss_fn_inputs["weights"].data


def test_four_tokens() -> None:
    """Prompt 7 8, completion 9 3: the target 9 stands after 8, and both completion tokens are trained."""
    expected = ([7, 8, 9], [8, 9, 3], [0, 1, 1])
    assert columns(datum_from_prompt_completion([7, 8], [9, 3])) == expected
    assert columns(datum_from_tokens_weights([7, 8, 9, 3], [0, 0, 1, 1])) == expected
    assert columns(datum_from_spans([7, 8, 9, 3], [(2, 4)])) == expected


@given(prompt=TOKENS, completion=TOKENS, advantage=st.floats(-2, 2, width=32))
def test_every_completion_token_counts(prompt: list[int], completion: list[int], advantage: float) -> None:
    """The first and the last completion token are trained, with their own log-prob and advantage, and no prompt token is."""
    logprobs = [-float(i + 1) for i in range(len(completion))]
    datum = datum_from_rollout(prompt, completion, logprobs, advantage, group_id=3)
    inputs, start = datum.loss_fn_inputs, len(prompt) - 1
    assert inputs["target_tokens"].data[start:] == completion
    assert inputs["weights"].data == [0] * start + [1] * len(completion)
    assert inputs["logprobs"].data == [0] * start + logprobs
    assert inputs["advantages"].data == [0] * start + [advantage] * len(completion)
    validate([datum], required=("target_tokens", "weights", "advantages", "logprobs"), vocab_size=51, known_keys=True)


@given(tokens=st.lists(st.integers(0, 9), min_size=3, max_size=9), limit=st.integers(1, 4))
def test_max_length_cuts_on_the_right(tokens: list[int], limit: int) -> None:
    """max_length keeps the first tokens, and refuses to drop everything that is trained."""
    datum = datum_from_tokens_weights(tokens, [1.0] * len(tokens), max_length=limit)
    assert len(datum.model_input) == min(limit, len(tokens) - 1)
    late = [0.0] * (len(tokens) - 1) + [1.0]
    if len(tokens) > limit + 1:
        with pytest.raises(DatumError, match="every trained token"):
            datum_from_tokens_weights(tokens, late, max_length=limit)


@pytest.mark.parametrize("limit", [-5, -1, 0, 2.0, True])
def test_max_length_is_a_length(limit: Any) -> None:
    """A length that is none is refused by every builder: a negative one would leave out the last tokens."""
    with pytest.raises(DatumError, match=f"max_length must be a whole number, 1 or more, got {limit}"):
        datum_from_tokens_weights(range(8), [1.0] * 8, max_length=limit)
    with pytest.raises(DatumError, match="max_length must be a whole number"):
        from_rows([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], None, max_length=limit, overlong="truncate")


def test_tempered_rollouts_need_their_samplers_logprobs() -> None:
    """A ratio is taken to the distribution that was sampled from; provenance is kept; a cut is warned of."""
    with pytest.raises(DatumError, match="every ratio would be wrong"):
        datum_from_rollout([1], [2], [-1.0], 1.0, temperature=0.7)
    with pytest.raises(DatumError, match="was not drawn"):
        datum_from_rollout([1], [2], [-1.0], 1.0, temperature=0.0)
    for cut in ({"top_p": 0.9}, {"top_k": 5}):
        with pytest.warns(UserWarning, match="had no chance"):
            datum_from_rollout([1], [2], [-1.0], 1.0, **cut)
    kept = datum_from_rollout(
        [1], [2], [-1.0], 1.0, temperature=0.5, weights_version=3, logprobs_of="sampler"
    ).loss_fn_inputs
    assert (kept["temperature"].data, kept["weights_version"].data) == ([0.5], [3])


def test_preference_pair() -> None:
    """Each side is trained from the end of the prompt; equal or empty responses are refused."""
    chosen, rejected = preference_pair([1, 2], [3, 4], [3], pair_id=5)
    assert columns(chosen) == ([1, 2, 3], [2, 3, 4], [0, 1, 1])
    assert columns(rejected) == ([1, 2], [2, 3], [0, 1])
    assert (chosen.loss_fn_inputs["role"].data, rejected.loss_fn_inputs["role"].data) == ([1], [0])
    validate([rejected, chosen], pairs=True)
    for answers in (([3], [3]), ([3], [])):
        with pytest.raises(DatumError):
            preference_pair([1], *answers)


class ChatTokenizer:
    """ChatML on characters."""

    def __init__(self, forgetful: bool = False) -> None:
        self.forgetful = forgetful

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        text = "".join(f"[{m['role']}]{m['content']}|" for m in messages[-2:])
        if not self.forgetful:
            text = "".join(f"[{m['role']}]{m['content']}|" for m in messages[:-2]) + text
        return text + ("[assistant]" if add_generation_prompt else "")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_messages() -> None:
    """Exactly the assistant's words and their end of turn are trained; a template that leaves turns out is refused."""
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "aha"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "bye"},
    ]
    _, targets, weights = columns(datum_from_messages(ChatTokenizer(), messages))
    assert "".join(chr(t) for t, w in zip(targets, weights, strict=True) if w) == "aha|bye|"
    with pytest.raises(DatumError, match="message 1"):
        datum_from_messages(ChatTokenizer(forgetful=True), messages)
    _, targets, weights = columns(datum_from_messages(ChatTokenizer(forgetful=True), messages, turns="last"))
    assert "".join(chr(t) for t, w in zip(targets, weights, strict=True) if w) == "bye|"
    with pytest.raises(DatumError, match="no message"):
        datum_from_messages(ChatTokenizer(), messages[:1])


@given(
    tokens=TOKENS,
    values=st.lists(st.floats(allow_nan=False, width=32), min_size=6, max_size=6),
    wide=st.booleans(),
)
def test_tinker_round_trip(tokens: list[int], values: list[float], wide: bool) -> None:
    """To tinker.Datum and back nothing is lost: values, dtypes, shapes, [T, K] included."""
    shape = [len(tokens), 2] if wide else [len(tokens)]
    targets = tokens * 2 if wide else tokens
    datum = Datum(
        ModelInput.from_ints(tokens),
        {
            "target_tokens": TensorData(targets, "int64", shape),
            "weights": TensorData(values[: len(tokens)], "float32"),
            "group_id": TensorData([4]),
        },
    )
    (there,) = to_tinker([datum])
    assert isinstance(there, tinker.Datum)
    assert there.loss_fn_inputs["target_tokens"].shape == shape
    assert from_tinker([there]) == [datum]


@pytest.mark.parametrize("name", loss_names())
def test_losses_take_tinker_datums(name: str) -> None:
    """A loss gives the same for the SDK's datums as for ours."""
    data = make_data([3, 4, 2, 5])
    logprobs = [torch.full((len(d.model_input),), -1.5 - i, requires_grad=True) for i, d in enumerate(data)]
    loss = get_loss(name)
    ours, metrics = loss(data, logprobs)
    theirs, same = loss(to_tinker(data), logprobs)
    assert ours.item() == theirs.item()
    assert metrics == same


def test_sparse_and_chunks() -> None:
    """Sparse tensors are filled up, several text chunks are joined, images are refused."""

    class Sparse:
        data, dtype, shape = (5.0, 6.0), "float32", (2, 3)
        sparse_crow_indices, sparse_col_indices = (0, 1, 2), (2, 0)

    class Foreign:
        model_input = tinker.ModelInput(
            chunks=[tinker.EncodedTextChunk(tokens=[1]), tinker.EncodedTextChunk(tokens=[2])]
        )
        loss_fn_inputs = {"weights": Sparse()}  # noqa: RUF012  # a stand-in

    (datum,) = from_tinker([Foreign()])
    assert datum.model_input.to_ints() == [1, 2]
    assert datum.loss_fn_inputs["weights"].tolist() == [[0, 0, 5], [6, 0, 0]]
    with pytest.raises(DatumError, match="only text"):
        from_tinker([type("Other", (), {"model_input": type("M", (), {"chunks": [object()]}), "loss_fn_inputs": {}})])


def test_all_problems_at_once() -> None:
    """Every problem of every datum is listed, with datum, field and position."""
    bad = [
        Datum(ModelInput.from_ints([1, 99]), {"target_tokens": [1], "weight": [1.0]}),
        Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [1, -1], "weights": [float("nan"), 1.0], "role": [7]}),
        Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [1, 2], "weights": [0.0, 1.0], "logprobs": [9.0, 0.5]}),
    ]
    with pytest.raises(InvalidDatumsError) as caught:
        validate(bad, required=("target_tokens", "weights"), vocab_size=50, known_keys=True)
    text = "\n".join(caught.value.problems)
    for part in (
        "datum 0: model_input has token ids outside the vocabulary at position 1: 99",
        "datum 0: missing required field 'weights'",
        "did you mean 'weights'",
        "datum 0: 'target_tokens' has shape [1] but model_input has 2 tokens",
        "datum 1: 'weights' is not finite at position 0",
        "datum 1: 'target_tokens' has token ids outside the vocabulary at position 1",
        "datum 1: 'role' is [7]",
        "datum 2: 'logprobs' is above 0 at position 1: 0.5",
    ):
        assert part in text
    assert len(caught.value.problems) == 8


def test_untrained_nonsense_is_fine() -> None:
    """NaN where the weight is 0 is no problem; the same NaN where it is trained is one."""
    inputs: dict[str, Any] = {"target_tokens": [1, 2], "weights": [0.0, 1.0], "advantages": [float("nan"), 1.0]}
    validate([Datum(ModelInput.from_ints([1, 2]), inputs)])
    with pytest.raises(InvalidDatumsError, match="position 0"):
        validate([Datum(ModelInput.from_ints([1, 2]), {**inputs, "weights": [1.0, 1.0]})])


def test_tensor_data() -> None:
    """Tensors are held without a copy; floats are not cut to integers; shapes must hold the numbers."""
    tensor = torch.tensor([1.0, 2.0])
    assert TensorData(tensor).to_torch().data_ptr() == tensor.data_ptr()
    assert TensorData([[1, 2], [3, 4]]).shape == [2, 2]
    with pytest.raises(DatumError, match="integers"):
        TensorData([1.5], "int64")
    with pytest.raises(LengthError, match="cannot hold"):
        TensorData([1, 2, 3], shape=[2])


def test_explain() -> None:
    """The table shows each target beside the weight that belongs to it."""
    lines = datum_from_rollout([7, 8], [9], [-0.5], 2.0).explain().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == [
        "position",
        "token",
        "target",
        "weight",
        "advantage",
        "logprob",
    ]
    assert [cell.strip() for cell in lines[2].split("|")] == ["1", "8", "9", "1", "2", "-0.5"]


@given(st.floats(-1000, 1000, width=32), st.booleans())
def test_only_the_label_is_no_weight(weight: float, wide: bool) -> None:
    """Weights below 0 are weights, whatever their size; the label of an untrained token, -100, is none."""
    shape: Any = [[2, 3], [4, 5]] if wide else [2, 3]

    def datum(w: float) -> Datum:
        return Datum(
            ModelInput.from_ints([1, 2]),
            {"target_tokens": shape, "weights": [[1.0, 0.0], [0.0, w]] if wide else [0.0, w]},
        )

    for near in (-99.99999, -100.00001):
        validate([datum(near)])
    if weight != -100:
        validate([datum(weight)])
    with pytest.raises(
        InvalidDatumsError, match=r"'weights' is -100 at position .*transformers' label.*give weight 0 there"
    ):
        validate([datum(-100)])


@pytest.mark.parametrize(
    ("given_name", "meant"),
    [
        ("rollout_logprobs", "logprobs"),
        ("behaviour_logprobs", "logprobs"),
        ("labels", "target_tokens"),
        ("mask", "weights"),
        ("reference_logprobs", "ref_logprobs"),
        ("advantage", "advantages"),
    ],
)
def test_names_of_other_libraries(given_name: str, meant: str) -> None:
    """A key that another library has for the same thing is answered with ours; one of a user's own is not guessed at."""
    for name, hint in ((given_name, f" \\(did you mean '{meant}'\\?\\)"), ("xyzzy", "")):
        datum = Datum(ModelInput.from_ints([1, 2]), {name: [0.0, 1.0]})
        with pytest.raises(
            InvalidDatumsError, match=f"unknown field '{name}'{hint}; registered losses would ignore it"
        ):
            validate([datum], known_keys=True)
