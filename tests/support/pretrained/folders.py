"""A random Llama and a byte tokenizer with the special tokens of a chat, in a folder as transformers writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pullback.testing import random_llama


def chat_folder(folder: Path) -> Path:
    """Write model and tokenizer; return the folder."""
    pytest.importorskip("transformers", reason="a folder with a model needs transformers (extra hf)")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    random_llama(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for every byte, and the special tokens of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
