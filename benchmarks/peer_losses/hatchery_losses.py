"""Hatchery's losses, which run in its service: from logits and weights, through its own log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from pullback.testing import Case

from .wrapped import PADDED, Wrapped, two_token_logits

__all__ = ["HATCHERY"]

_LOSSES: Final = "hatchery.core.losses"
_ROWS: Final = {"form": "padded", "per_sequence": ("advantages",)}


def _called(name: str, logprobs: Tensor, weights: Tensor, **inputs: Any) -> Any:
    module = import_module(_LOSSES)
    targets = torch.where(weights != 0, 0, -100)
    inputs = {key: value.float() for key, value in inputs.items()}  # as they come over the wire
    return module.compute(name, module.LossInputs(two_token_logits(logprobs, weights), targets, weights, **inputs))


def likelihood(logprobs: Tensor, weights: Tensor) -> Any:
    """Cross-entropy."""
    return _called("cross_entropy", logprobs, weights)


def policy(name: str) -> Callable[..., Any]:
    """Return a policy loss."""

    def loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Any:
        return _called(name, logprobs, weights, old_logprobs=old_logprobs, advantages=advantages)

    return loss


def gspo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Any:
    """GSPO, with one advantage for each sequence."""
    return policy("gspo")(logprobs, old_logprobs, advantages[:, None].expand_as(logprobs), weights)


def orpo(logprobs: Tensor, weights: Tensor) -> Any:
    """ORPO, of neighbours."""
    return _called("orpo", logprobs, weights)


def gspo_gradient(case: Case) -> Sequence[Sequence[float]]:
    """The gradient of GSPO with Hatchery's range and its mean over sequences: one ratio for each sequence."""
    rows = []
    for s in case.sequences:
        trained = s.trained()
        total = sum(s.weights[j] for j in trained)
        drift = sum(s.weights[j] * (s.logprobs[j] - s.old_logprobs[j]) for j in trained) / total
        ratio, advantage = math.exp(drift), s.advantages[trained[0]]
        clipped = ratio > 1 + 4e-4 if advantage > 0 else ratio < 1 - 3e-4
        slope = 0.0 if clipped else -advantage * ratio / max(total, 1.0) / len(case.sequences)
        rows.append([w * slope for w in s.weights])
    return rows


HATCHERY: Final = (
    Wrapped("Hatchery", "cross_entropy", f"{_LOSSES}._cross_entropy", lambda: likelihood),
    *(
        Wrapped("Hatchery", name, f"{_LOSSES}._{name}", partial(policy, name), PADDED)
        for name in ("importance_sampling", "ppo", "cispo", "grpo", "dapo")
    ),
    Wrapped("Hatchery", "gspo", f"{_LOSSES}._gspo", lambda: gspo, {**_ROWS, "expected": gspo_gradient}),
    Wrapped("Hatchery", "orpo", f"{_LOSSES}._orpo", lambda: orpo, {**PADDED, "kind": "pair"}),
)
