"""The models and batches that the benchmarks share."""

from __future__ import annotations

from typing import Any

import torch

from pullback import Datum, ModelInput, TorchBackend
from pullback.cli.arguments.models import smollm2_file
from pullback.testing import random_llama

__all__ = ["batch", "load"]


def load(name: str, *, lora: int | None, **options: Any) -> TorchBackend:
    """Return a backend on ``smollm2``, or on ``tiny``: a random Llama of the same proportions."""
    if name == "smollm2":
        folder, file = smollm2_file()
        return TorchBackend.from_pretrained(folder, gguf_file=file, lora=lora, **options)
    from pullback.backends.native import HFModel
    from pullback.backends.native.models.lora import add_lora

    device = options.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    model = random_llama(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype=getattr(torch, options.pop("dtype", "float32")),
    ).to(device)
    return TorchBackend(HFModel(model if lora is None else add_lora(model, lora)), **options)


def batch(lengths: list[int], vocab: int, prompt_share: float = 0.25) -> list[Datum]:
    """Random sequences with every input that a loss may need; the first part of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for i, length in enumerate(lengths):
        tokens = torch.randint(vocab, (length + 1,), generator=generator)
        near = -3.0 + 0.3 * torch.randn(length, generator=generator)
        trained = (torch.arange(length) >= int(prompt_share * length)).float()
        inputs: dict[str, Any] = {
            "target_tokens": tokens[1:],
            "weights": trained,
            "advantages": torch.randn(1, generator=generator).expand(length).clone(),
            "logprobs": near,
            "ref_logprobs": near,
            "group_id": [i // 4],
        }
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data
