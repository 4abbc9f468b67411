"""The models of the demo, and how text becomes tokens for each."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from ...backends.native.models.layers import layer_names
from ...backends.native.models.lora import LoraChoice
from ...datums.chat import ChatReader, read_chat
from ...errors import ConfigError, require_extra
from ...service.served.registry import Base
from ..arguments.models import NamedModel, load_named
from .tasks import Reward, Sum, digit_reward, sum_reward

__all__ = ["DemoModel", "pretrained", "tiny"]


@final
@dataclass(frozen=True)
class DemoModel:
    """A base model, the adapter that every objective trains from the same start, and the handling of text.

    Attributes:
        name, device, dtype: for the report.
        base: frozen weights.
        lora: the adapter.
        encode, decode: text to token ids and back.
        chat: turns a question, or questions with answers between them, into a prompt.
        example: turns a sum into a prompt with one solved example before it.
        end: text that ends an answer.
        max_new_tokens: of a sampled answer.
        max_text_tokens: of a documentation paragraph.
        reward: of a sampled answer.
        learning_rate: factor on the objectives' learning rates.
        tokenizer: of transformers; None if there is none.
        adds: the model can tell a right sum from a wrong one; otherwise preferences concern the form of an answer only.
    """

    name: str
    device: str
    dtype: str
    base: Base
    lora: LoraChoice
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    chat: Callable[..., str]
    example: Callable[[Sum], str]
    end: str
    max_new_tokens: int
    max_text_tokens: int
    reward: Reward
    learning_rate: float = 1.0
    tokenizer: Any = None
    adds: bool = True


def pretrained(name: str, device: str, dtype: str) -> DemoModel:
    """Load ``smollm2`` or a folder, with LoRA of rank 8 on the query and value projections.

    A model that has no layers of these names, as Phi 3 and GPT-2, gets it on all layers of its attention.

    Raises:
        ConfigError: the folder has no tokenizer with a chat template and an end-of-text token.
    """
    require_extra("transformers", "hf", "the demo").utils.logging.disable_progress_bar()
    loaded = load_named(name, dtype=dtype, device=device)
    tokenizer: Any = loaded.tokenizer
    chat, end = (_smollm2_chat, "<|im_end|>") if name == "smollm2" else _chat_of(loaded)
    return DemoModel(
        name=f"{'SmolLM2-135M-Instruct' if name == 'smollm2' else name}, LoRA rank 8",
        device=device,
        dtype=dtype,
        base=Base(name, loaded.model, str(loaded.folder), attention=_adapted(loaded.model)),
        lora=LoraChoice(rank=8, train_mlp=False),
        encode=lambda text: [int(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"]],
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        chat=chat,
        example=lambda s: chat("What is 2 + 6?", "<answer>8</answer>", f"What is {s.x} + {s.y}?"),
        end=end,
        max_new_tokens=10,
        max_text_tokens=64,
        reward=sum_reward,
        learning_rate=0.5,
        tokenizer=tokenizer,
    )


def _adapted(model: Any) -> Sequence[str]:
    """Return the names of the query and value projections, or of all layers of attention where these are not apart."""
    attention = layer_names(model).attention
    ends = [name.rpartition(".")[2] for name in attention]
    apart = {"q_proj", "v_proj"} <= set(ends)
    return [name for name, end in zip(attention, ends, strict=True) if not apart or end in ("q_proj", "v_proj")]


def _smollm2_chat(*turns: str) -> str:
    pairs = zip(turns[::2], turns[1::2], strict=False)
    before = "".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for question, answer in pairs
    )
    return f"{before}<|im_start|>user\n{turns[-1]}<|im_end|>\n<|im_start|>assistant\n"


def _chat_of(loaded: NamedModel) -> tuple[Callable[..., str], str]:
    """Return the chat format of a tokenizer and the text that ends an answer."""
    tokenizer = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None) is None or tokenizer.eos_token is None:
        raise ConfigError(
            f"the demo needs a tokenizer with a chat template and an end-of-text token in {loaded.folder}"
        )

    def chat(*turns: str) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return chat, _end_of_turn(tokenizer)


def _end_of_turn(tokenizer: Any) -> str:
    """Return the one token that a template ends an answer with, which need not be the end of a text: Gemma, Phi."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text, spans = ChatReader(tokenizer).read(read_chat(messages))
    end = text[spans[-1].start : spans[-1].stop].rpartition("answer")[2].strip()
    return end if len(tokenizer(end, add_special_tokens=False)["input_ids"]) == 1 else str(tokenizer.eos_token)


def tiny(device: str) -> DemoModel:
    """Make a random two-layer Llama on characters: nothing to download, and texts mean nothing to it."""
    characters = string.printable[:95] + "\n\x00"
    ids = {character: i for i, character in enumerate(characters)}
    unknown = ids["?"]
    config = {"vocab_size": len(characters), "hidden_size": 48, "max_position_embeddings": 128}
    return DemoModel(
        name="random two-layer character model, LoRA rank 16",
        device=device,
        dtype="float32",
        base=Base("tiny", load_named("tiny", device=device, config=config).model),
        lora=LoraChoice(rank=16, train_unembed=True),
        encode=lambda text: [ids.get(character, unknown) for character in text],
        decode=lambda tokens: "".join(characters[token] for token in tokens).rstrip("\x00"),
        chat=lambda question: f"{question}\n",
        example=lambda s: f"{s.x} + {s.y}?\n",
        end="\x00",
        max_new_tokens=6,
        max_text_tokens=48,
        reward=digit_reward,
        learning_rate=2.5,
        adds=False,
    )
