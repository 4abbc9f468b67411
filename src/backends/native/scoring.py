"""The forward pass: log-probs of the target tokens of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .adapter import ModelAdapter
from .batching import Layout, ScoreRequest, arrange
from .head import selected_logprobs

__all__ = ["model_device", "score"]


def model_device(model: ModelAdapter) -> torch.device:
    """Where the head, and so the log-probs, live."""
    return model.head().weight.device


def score(model: ModelAdapter, requests: Sequence[ScoreRequest], layout: Layout) -> Tensor:
    """Return the log-probs of all target tokens end to end, [N] or [N, K]; 0.0 where not needed.

    Differentiable with respect to the model's parameters.
    """
    if layout == "single":
        return torch.cat([score(model, [r], "padded") for r in requests])
    device = model_device(model)
    needed = torch.cat([r.needed for r in requests]).to(device)
    targets = torch.cat([r.targets for r in requests]).to(device)
    rows = arrange(requests, layout, device)
    hidden = model.hidden_states(rows.tokens, rows.positions)
    wanted = hidden.flatten(0, 1)[rows.place[needed]]
    logprobs = selected_logprobs(wanted, model.head(), targets[needed])
    return logprobs.new_zeros(targets.shape).index_put((needed.nonzero().squeeze(1),), logprobs)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a gradient, by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
