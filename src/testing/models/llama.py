"""A random Llama of transformers: a real architecture without a download."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import require_extra

__all__ = ["random_llama"]


def random_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Return a ``LlamaForCausalLM`` with two layers and random weights, the same for the same arguments.

    Args:
        seed: of the weights; the global random state does not change.
        dtype: of the weights.
        config: of ``transformers.LlamaConfig``, e.g. ``vocab_size=512``; by default no token begins or ends a text.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = require_extra("transformers", "hf", "a random Llama")
    defaults = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings: dict[str, Any] = {**defaults, "bos_token_id": None, "eos_token_id": None, **config}
    settings.setdefault("intermediate_size", 2 * settings["hidden_size"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).to(dtype)
