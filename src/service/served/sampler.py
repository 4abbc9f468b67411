"""Weights to sample from, and the requests on them that are decoded together."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator
from typing import Final, final

import torch
from torch import Tensor

from ...backends import SamplingParams
from ...backends.calls.requests import ScoreRequest
from ...backends.native.decoding.batch import ContinuousBatch
from ...backends.native.decoding.next_tokens import given_tokens, sampled_tokens, top_k_tokens
from ...backends.native.decoding.requests import Ends
from ...backends.native.decoding.sampling import rollouts_of
from ...backends.native.execution.forward import model_device, score
from ...backends.native.models.hf import HFModel
from ...backends.types import Rollout
from ...datums.types import ModelInput

__all__ = ["Sampler"]

_SLICE_SECONDS: Final = 0.05  # a slice begins no further step after these


@final
class Sampler:
    """Weights to sample from, frozen at the moment they were saved.

    Args:
        model: the weights.
        version: optimizer steps they had seen.
        batch: where its requests are decoded.
    """

    def __init__(self, model: HFModel, version: int, batch: ContinuousBatch) -> None:
        self.model, self.version, self.batch = model, version, batch

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.model.head().weight.shape[0]

    def complete(
        self, prompt: ModelInput, n: int, params: SamplingParams, ends: Ends | None = None, owner: str = ""
    ) -> Generator[None, None, list[Rollout]]:
        """Sample n completions, in slices, together with all other requests of the batch.

        Args:
            prompt: what is completed.
            n: how many completions.
            params: how they are sampled.
            ends: says of a completion's tokens whether they end it too.
            owner: owners share the batch fairly.
        """
        seed = secrets.randbits(62) if params.seed is None else params.for_prompt(0).seed
        request = self.batch.add(prompt, n, params, seed or 0, ends=ends, owner=owner, model=self.model)
        try:
            while not request.done:
                seen = self.batch.steps
                yield
                if self.batch.steps == seen and not request.done:  # no other request has moved all of them since
                    self._advance()
            return rollouts_of(request, 0, self.version)
        finally:
            self.batch.cancel(request)

    def _advance(self) -> None:
        until = time.monotonic() + _SLICE_SECONDS
        self.batch.advance()
        while self.batch.busy and time.monotonic() < until:
            self.batch.advance()

    def top_k(self, tokens: Tensor, k: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """See `top_k_tokens`."""
        return top_k_tokens(self.model, tokens, k, first)

    def sampled(self, tokens: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """See `sampled_tokens`."""
        generator = torch.Generator(model_device(self.model))
        generator.seed()
        return sampled_tokens(self.model, tokens, k, temperature, generator)

    def given(self, tokens: Tensor, given: Tensor) -> Tensor:
        """See `given_tokens`."""
        return given_tokens(self.model, tokens, given)

    @torch.no_grad()
    def prompt_logprobs(self, prompt: ModelInput) -> list[float]:
        """Return the log-prob of each prompt token given those before it; NaN for the first."""
        tokens = prompt.tokens
        if len(tokens) < 2:
            return [float("nan")] * len(tokens)
        needed = torch.ones(len(tokens) - 1, dtype=torch.bool)
        logprobs: Tensor = score(self.model, [ScoreRequest(tokens[:-1], tokens[1:], needed)], "single")
        return [float("nan"), *logprobs.tolist()]
