"""Datums for tests of backends, with every input that a registered loss may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..datums.types import Datum, ModelInput

__all__ = ["example_datums"]


def example_datums(lengths: Sequence[int], seed: int = 0, vocab_size: int = 17, **extra: Any) -> list[Datum]:
    """Return random datums. Neighbours are pairs and share a group; the first position is not trained.

    Args:
        lengths: tokens of each datum; an even number of datums makes whole pairs.
        seed: of tokens and inputs.
        vocab_size: token ids are below it.
        extra: more inputs, the same for all datums.
    """
    generator = torch.Generator().manual_seed(seed)

    def near(values: Tensor, spread: float) -> Tensor:
        return values + spread * torch.randn(values.shape, generator=generator)

    data = []
    for i, length in enumerate(lengths):
        tokens = torch.randint(vocab_size, (length + 1,), generator=generator)
        base = torch.full((length,), -3.0)
        inputs: dict[str, Any] = {
            "target_tokens": tokens[1:],
            "weights": (torch.arange(length) >= min(1, length - 1)).float(),
            "advantages": torch.randn(length, generator=generator),
            "logprobs": near(base, 0.3),
            "ref_logprobs": near(base, 0.3),
            "group_id": [i // 2],
            "label": [1 - i % 2],
            "reference_point": [0.25],
            **extra,
        }
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data
