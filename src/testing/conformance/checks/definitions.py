"""The protocol's named losses as functions whose cotangents are closed forms, so that they say nothing but the definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ....backends.protocol import CustomLoss
from ....datums.types import Datum
from ... import oracles
from ...cases import Case, CaseSequence

__all__ = ["DEFINITIONS", "defined"]

DEFINITIONS: Final[Sequence[tuple[str, Mapping[str, float]]]] = (
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}),
)


def defined(name: str, config: Mapping[str, float]) -> CustomLoss:
    """Return a function with the gradient of a named loss, by `pullback.testing.oracles`.

    Args:
        name: ``cross_entropy``, ``importance_sampling`` or ``ppo``.
        config: of ``ppo``: its clip range.
    """

    def function(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        case = Case(tuple(_sequence(d, x) for d, x in zip(data, logprobs, strict=True)))
        cotangents = _cotangents(case, name, config)
        terms = [(x.new_tensor(c) * x).sum() for c, x in zip(cotangents, logprobs, strict=True)]
        return torch.stack(terms).sum(), {}

    return function


def _cotangents(case: Case, name: str, config: Mapping[str, float]) -> list[list[float]]:
    if name == "cross_entropy":
        return oracles.cross_entropy(case, "sum")
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    clip = (low, high) if name == "ppo" else None
    return oracles.grpo(case, "sum", clip, kl="none")


def _sequence(datum: Datum, logprobs: Tensor) -> CaseSequence:
    inputs = {key: value.to_torch().tolist() for key, value in datum.loss_fn_inputs.items()}
    rollout = inputs["logprobs"]
    policy = logprobs.detach().double().tolist()
    return CaseSequence(policy, inputs["weights"], inputs["advantages"], rollout, rollout, inputs["ref_logprobs"])
