"""What a transformers model itself says of a text, to compare a backend with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.backends import TorchBackend
from pullback.datums import Datum
from pullback.testing.models.zoo_table import sharing_prompt

__all__ = ["largest_error", "own_logprobs", "sharing_prompt"]


def own_logprobs(model: Any, datum: Datum) -> Tensor:
    """What the transformers model itself says of one sequence, [T]."""
    logits = model(input_ids=datum.model_input.tokens[None], use_cache=False).logits[0].log_softmax(-1)
    found: Tensor = logits.gather(-1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, None])[:, 0]
    return found


def largest_error(backend: TorchBackend, model: Any, data: list[Datum]) -> float:
    """Largest difference of a log-prob from the model's own, nats."""
    outputs = backend.forward(data).result().loss_fn_outputs
    with torch.no_grad():
        own = [own_logprobs(model, datum) for datum in data]
    return max(float((o["logprobs"].to_torch() - x).abs().max()) for o, x in zip(outputs, own, strict=True))
