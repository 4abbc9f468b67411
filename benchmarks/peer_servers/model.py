"""The model that all servers serve: a tiny Qwen3 with random fp32 weights, and a tokenizer without a text behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pullback.errors import require_extra

__all__ = ["write_model"]

_VOCAB = 64


def write_model(folder: Path) -> Path:
    """Write the model, the same each time, and return its folder."""
    transformers: Any = require_extra("transformers", "hf", "a model for the servers")
    tokenizers: Any = require_extra("tokenizers", "hf", "a tokenizer for the servers")
    words = {f"w{i}": i for i in range(_VOCAB)}
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")),
        eos_token=f"w{_VOCAB - 1}",
        pad_token=f"w{_VOCAB - 2}",
    )
    config = transformers.Qwen3Config(
        vocab_size=_VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_VOCAB - 1,
        pad_token_id=_VOCAB - 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder
