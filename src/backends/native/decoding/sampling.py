"""Sampling: prompts once, then one token a step for every unfinished completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....datums.types import ModelInput
from ...sampling import check_prompts, drawn_seed
from ...types import Rollout, SamplingParams
from ..causal_lm import CausalLM
from .batch import ContinuousBatch, facts_of
from .requests import Ends, GenerationRequest

__all__ = ["draw", "rollouts_of"]


def draw(
    model: CausalLM,
    prompts: Sequence[ModelInput],
    n: int,
    params: SamplingParams,
    generator: torch.Generator,
    version: int,
    ends: Ends | None = None,
) -> list[Rollout]:
    """Draw ``n`` completions of each prompt, prompt-major; one for which ``ends`` says so stops too.

    Each completion has random numbers of its own, which follow from the seed; without one, from the generator.

    Raises:
        InvalidDatumsError: a prompt is empty, has tokens outside the vocabulary, or leaves the model's context.
    """
    check_prompts(prompts, n, model.head().weight.shape[0], facts_of(model).max_length, params.max_tokens)
    batch = ContinuousBatch(model)
    requests = []
    for i, prompt in enumerate(prompts):
        seed = params.for_prompt(i).seed
        requests.append(batch.add(prompt, n, params, drawn_seed(generator) if seed is None else seed, ends=ends))
    while batch.busy:
        batch.advance()
    return [rollout for i, request in enumerate(requests) for rollout in rollouts_of(request, i, version)]


def rollouts_of(request: GenerationRequest, prompt_index: int, version: int) -> list[Rollout]:
    """Return the completions of a request that is done.

    Raises:
        Exception: what it failed with.
    """
    params = request.params
    return [
        Rollout(
            prompt_index,
            row.tokens,
            row.logprobs,
            row.stop_reason or "length",
            version,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            sampler_logprobs=row.tempered if params.temperature > 0 else None,
        )
        for row in request.result()
    ]
