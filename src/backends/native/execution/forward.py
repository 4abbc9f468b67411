"""The forward pass: hidden states of a micro-batch, and log-probs of its target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from ....ops.logprobs import selected_logprobs
from ..causal_lm import CausalLM
from .batching import Layout, ScoreRequest, arrange

__all__ = ["Wanted", "model_device", "needed_hidden", "score", "trainable"]


@final
@dataclass(frozen=True, eq=False)
class Wanted:
    """Which positions of a micro-batch are scored, and on what.

    Attributes:
        targets: int64 [M] or [M, K], of the needed positions.
        at: int64 [M]; their places among the N positions of the micro-batch.
        shape: of all targets, [N] or [N, K].
    """

    targets: Tensor
    at: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, requests: Sequence[ScoreRequest], device: torch.device) -> Wanted:
        """Collect the needed positions of sequences, end to end."""
        needed = torch.cat([r.needed for r in requests]).to(device)
        targets = torch.cat([r.targets for r in requests]).to(device)
        return cls(targets[needed], needed.nonzero()[:, 0], tuple(targets.shape))

    def spread(self, logprobs: Tensor) -> Tensor:
        """Put log-probs of the needed positions among zeros, [N] or [N, K]."""
        return logprobs.new_zeros(self.shape).index_put((self.at,), logprobs)


def model_device(model: CausalLM) -> torch.device:
    """Where the head, and so the log-probs, live."""
    known = getattr(model, "device", None)  # a head may have to be computed
    return known if isinstance(known, torch.device) else model.head().weight.device


def needed_hidden(model: CausalLM, requests: Sequence[ScoreRequest], layout: Layout) -> Tensor:
    """Return the hidden states before the head at the needed positions, [M, H]."""
    if layout == "single":
        return torch.cat([needed_hidden(model, [r], "padded") for r in requests])
    rows = arrange(requests, layout, model_device(model))
    hidden = model.hidden_states(rows.tokens, rows.positions)
    needed = torch.cat([r.needed for r in requests])
    return hidden.flatten(0, 1)[rows.place[needed.to(rows.place.device)]]


def score(model: CausalLM, requests: Sequence[ScoreRequest], layout: Layout) -> Tensor:
    """Return the log-probs of all target tokens end to end, [N] or [N, K]; 0.0 where not needed.

    Differentiable with respect to the model's parameters.
    """
    wanted = Wanted.of(requests, model_device(model))
    hidden = needed_hidden(model, requests, layout)
    return wanted.spread(selected_logprobs(hidden, model.head(), wanted.targets))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a gradient, by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
