"""Whether a backend's sampler and its trainer mean the same policy: their log-probs of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from ..backends.types import SamplingParams
from ..datums.builders import datum_from_rollout
from ..datums.types import ModelInput

__all__ = ["Agreement", "sampling_agreement"]


@final
@dataclass(frozen=True)
class Agreement:
    """Absolute differences between sampler's and trainer's log-probs, nats, and what they do to a ratio.

    Attributes:
        tokens: compared.
        largest, p99, mean: of the differences.
        ratio_mean: mean importance ratio, 1 where they agree.
    """

    tokens: int
    largest: float
    p99: float
    mean: float
    ratio_mean: float


def sampling_agreement(
    backend: Any, prompts: Sequence[ModelInput], *, n: int = 4, params: SamplingParams | None = None
) -> Agreement:
    """Sample, and score the samples with the same weights (as a step at learning rate 0 would).

    Args:
        backend: can `sample` and `forward`.
        prompts: to complete.
        n: completions of each.
        params: how to sample; temperature and cuts must not matter, since log-probs are those of the untempered policy.
    """
    params = params or SamplingParams(max_tokens=32, seed=0)
    rollouts = backend.sample(prompts, n, params).result()
    data = [
        datum_from_rollout(prompts[r.prompt_index].tokens.tolist(), r.tokens, logprobs=r.logprobs, advantage=1.0)
        for r in rollouts
    ]
    outputs = backend.forward(data).result().loss_fn_outputs
    found = torch.cat([o["logprobs"].to_torch()[-len(r.tokens) :] for o, r in zip(outputs, rollouts, strict=True)])
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    difference = (found - sampled).double()
    size = difference.abs()
    return Agreement(
        tokens=len(size),
        largest=float(size.max()),
        p99=float(size.quantile(0.99)),
        mean=float(size.mean()),
        ratio_mean=float(difference.exp().mean()),
    )
