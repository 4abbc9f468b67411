"""Which datum of a call is to blame for a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...calls.requests import ScoreRequest
from ..accumulator import all_finite
from ..causal_lm import CausalLM
from .forward import score

__all__ = ["blame"]


def blame(model: CausalLM, trained: Sequence[Tensor], requests: Sequence[ScoreRequest], datums: Sequence[int]) -> str:
    """Name the first of some datums to whose log-probs the gradient is not finite.

    Args:
        model: the model.
        trained: its weights that take a gradient.
        requests: of all datums.
        datums: which of them are asked.
    """
    for i in datums:
        logprobs = score(model, [requests[i]], "single")
        gradients = torch.autograd.grad(logprobs.sum(), trained, allow_unused=True)
        if not all_finite([g for g in gradients if g is not None]):
            return f"datum {i}"
    if len(datums) == 1:
        return f"datum {datums[0]} (the gradient of its log-probs is finite, and overflows times the loss's cotangent)"
    return "no single datum (the gradients of their log-probs are finite, and overflow times the loss's cotangents, or summed)"
