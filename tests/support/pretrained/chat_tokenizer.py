"""A byte-level BPE tokenizer of transformers, made of a list of words, and an independent account of what its tokens hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["SPECIAL", "WORDS", "chat_tokenizer", "overlapping", "token_bytes"]

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>",
)  # fmt: skip
WORDS = (
    " the", " sky", " is", " blue", " green", " what", " colour", " It", " hello", " weather", " in", " Paris", " sunny",
    "user", "assistant", "system", "model", "tool", "hello", "Yes", "No", "hi", "\n\n", "\n\n\n", "  ", ": ", " a", ":)",
    "think",
)  # fmt: skip
_SYMBOLS = bytes_to_unicode()
_BYTES = {symbol: byte for byte, symbol in _SYMBOLS.items()}


def chat_tokenizer(
    template: str, trim_offsets: bool = False, bos: bool = False, strips: str | None = None, regex: bool = False
) -> Any:
    """Return a tokenizer with a chat template.

    Args:
        template: Jinja.
        trim_offsets: leave white space out of the offsets that it reports, as some published tokenizers do.
        bos: begin texts with ``<s>``.
        regex: cut texts into words first, as GPT-2 does: white space is cut otherwise where a word follows.
        strips: ``lstrip`` or ``rstrip``: special tokens take the white space before or after them, as Phi 3's do.
    """
    vocabulary, merges = {symbol: i for i, symbol in enumerate(_SYMBOLS.values())}, []
    for word in WORDS:
        symbols = "".join(_SYMBOLS[byte] for byte in word.encode())
        for j in range(1, len(symbols)):
            merges.append((symbols[:j], symbols[j]))
            vocabulary.setdefault(symbols[: j + 1], len(vocabulary))
    merges = list(dict.fromkeys(merges))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    # one piece of text (without a regex): every merge may cross the border between a header and an answer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    strip = {} if strips is None else {strips: True}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False, **strip) for token in SPECIAL])
    if bos:
        begin = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    elif trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    return made


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token holds, from its name in the vocabulary alone."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    return name.encode() if name in SPECIAL else bytes(_BYTES[symbol] for symbol in name)


def overlapping(tokenizer: Any, ids: Sequence[int], pieces: Sequence[tuple[str, bool]]) -> list[bool]:
    """Return of each token whether it holds a byte of a piece that is drawn; the pieces are the whole text."""
    drawn = [flag for text, flag in pieces for _ in text.encode()]
    held, place = [], 0
    for token in ids:
        width = len(token_bytes(tokenizer, token))
        held.append(any(drawn[place : place + width]))
        place += width
    assert place == len(drawn), "the pieces are not the text of the tokens"
    return held
