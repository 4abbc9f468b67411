"""The forward pass: hidden states of a micro-batch, and log-probs of its target tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ....ops.logprobs import selected_logprobs
from ....ops.own_positions import own_positions_logprobs
from ...calls.requests import ScoreRequest
from ..causal_lm import CausalLM
from .batching import Layout, MicroBatch

__all__ = [
    "batch_hidden",
    "batch_logprobs",
    "keep_in_evaluation",
    "model_device",
    "needed_hidden",
    "score",
    "score_forwards",
    "trainable",
]

_logger = logging.getLogger(__name__)


def model_device(model: CausalLM) -> torch.device:
    """Where the head, and so the log-probs, live."""
    known = getattr(model, "device", None)  # a head may have to be computed
    return known if isinstance(known, torch.device) else model.head().weight.device


def batch_hidden(model: CausalLM, batch: MicroBatch) -> Tensor:
    """Return the hidden states before the head at the needed positions, [M, H]."""
    rows = [model.hidden_states(r.tokens, r.positions).flatten(0, 1)[r.place] for r in batch.rows]
    hidden = rows[0] if len(rows) == 1 else torch.cat(rows)
    return hidden[batch.index.at]


def batch_logprobs(model: CausalLM, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """Return the log-probs of all target tokens end to end, [N] or [N, K]; 0.0 where not needed.

    Args:
        model: its head is used.
        hidden: of the needed positions, [M, H]; see `batch_hidden`.
        batch: the micro-batch.
    """
    head, targets = model.head(), batch.index.targets
    if head.group is None:
        logprobs = selected_logprobs(hidden, head, targets, temperature=batch.temperature)
    else:
        logprobs = own_positions_logprobs(hidden, head, targets, head.group, temperature=batch.temperature)
    return batch.index.scatter(logprobs)


def needed_hidden(model: CausalLM, requests: Sequence[ScoreRequest], layout: Layout) -> Tensor:
    """Lay sequences out and return the hidden states at their needed positions, [M, H]; see `batch_hidden`."""
    return batch_hidden(model, MicroBatch.of(requests, layout, model_device(model)))


def score(model: CausalLM, requests: Sequence[ScoreRequest], layout: Layout) -> Tensor:
    """Return the log-probs of all target tokens end to end, [N] or [N, K]; 0.0 where not needed.

    Differentiable with respect to the model's parameters.
    """
    batch = MicroBatch.of(requests, layout, model_device(model))
    return batch_logprobs(model, batch_hidden(model, batch), batch)


def score_forwards(model: CausalLM, forwards: Iterable[MicroBatch]) -> dict[int, Tensor]:
    """Return the log-probs of the datums of some forwards, on the CPU."""
    scored: dict[int, Tensor] = {}
    for batch in forwards:
        logprobs = batch_logprobs(model, batch_hidden(model, batch), batch)
        if not batch.stands_for_none:
            scored |= {i: values.cpu() for i, values in batch.apart(logprobs).items()}
    return scored


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a gradient, by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def keep_in_evaluation(*models: CausalLM) -> None:
    """Put models back into evaluation mode, if anything in them has left it: in training mode their dropout is on."""
    for module in cast(tuple[nn.Module, ...], models):
        if any(one.training for one in module.modules()):
            _logger.warning(
                "%s was in training mode; it is put into evaluation mode, in which dropout is off",
                type(module).__name__,
            )
            module.eval()
