"""Whether a backend's sampler and its trainer give the same tokens the same log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from ..backends.types import SamplingParams
from ..datums.rollouts import datum_from_rollout
from ..datums.types import ModelInput

__all__ = ["Agreement", "sampling_agreement"]


@final
@dataclass(frozen=True)
class Agreement:
    """Absolute differences between the sampler's and the trainer's log-probs, in nats.

    Attributes:
        tokens: how many were compared.
        largest, p99, mean: of the differences.
        ratio_mean: mean importance ratio, which is 1 if the two agree.
    """

    tokens: int
    largest: float
    p99: float
    mean: float
    ratio_mean: float


def sampling_agreement(
    backend: Any, prompts: Sequence[ModelInput], *, n: int = 4, params: SamplingParams | None = None
) -> Agreement:
    """Sample completions and score them with the same weights.

    Args:
        backend: has `sample` and `forward`.
        prompts: to complete.
        n: completions of each prompt.
        params: how to sample. Temperature, top-k and top-p must not matter: log-probs are those of the untempered policy.
    """
    params = params or SamplingParams(max_tokens=32, seed=0)
    rollouts = backend.sample(prompts, n, params).result()
    data = [
        datum_from_rollout(prompts[r.prompt_index].tokens.tolist(), r.tokens, logprobs=r.logprobs, advantage=1.0)
        for r in rollouts
    ]
    outputs = backend.forward(data).result().loss_fn_outputs
    trainer = torch.cat([o["logprobs"].to_torch()[-len(r.tokens) :] for o, r in zip(outputs, rollouts, strict=True)])
    sampler = torch.tensor([x for r in rollouts for x in r.logprobs])
    log_ratio = (trainer - sampler).double()
    difference = log_ratio.abs()
    return Agreement(
        tokens=len(difference),
        largest=float(difference.max()),
        p99=float(difference.quantile(0.99)),
        mean=float(difference.mean()),
        ratio_mean=float(log_ratio.exp().mean()),
    )
