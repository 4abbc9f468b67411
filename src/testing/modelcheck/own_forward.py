"""What a transformers model itself says of a text, to compare a backend with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.native.models.facts.rope import reset_dynamic_rope
from ...datums.types import Datum

__all__ = ["own_logprobs", "own_logprobs_of"]


def own_logprobs(model: Any, datum: Datum) -> Tensor:
    """Return the log-probs that the transformers model itself gives, alone, [T]."""
    reset_dynamic_rope(model)
    tokens = datum.model_input.tokens[None].to(model.device)
    logits = model.model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
    targets = datum.loss_fn_inputs["target_tokens"].to_torch().to(logits.device)
    found: Tensor = logits.gather(-1, targets[:, None])[:, 0]
    return found


@torch.no_grad()
def own_logprobs_of(model: Any, data: Sequence[Datum]) -> list[Tensor]:
    """Return them for several texts, without a gradient."""
    return [own_logprobs(model, datum) for datum in data]
