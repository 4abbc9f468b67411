"""A language model that is a table, so that everything about it has a closed form."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Self, final

import torch
from torch import Tensor

from ..calls.requests import ScoreRequest
from ..sampling import RowParams, choose_tokens
from ..types import AdamParams, SamplingParams

__all__ = ["TableModel"]


@final
@dataclass
class TableModel:
    """Logits of the next token by the token before, fp64 [V, V], with AdamW's moments; no autograd anywhere."""

    logits: Tensor
    first: Tensor
    second: Tensor
    steps: int = 0

    @classmethod
    def random(cls, vocab_size: int, seed: int) -> Self:
        """Draw the logits."""
        generator = torch.Generator().manual_seed(seed)
        return cls.of(torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64))

    @classmethod
    def of(cls, logits: Tensor) -> Self:
        """Start cold from these logits."""
        return cls(logits, torch.zeros_like(logits), torch.zeros_like(logits))

    def score(self, request: ScoreRequest) -> Tensor:
        """Log-probs of the targets, [T] or [T, K]."""
        rows, targets = (self.logits / request.temperature).log_softmax(-1)[request.tokens], request.targets
        found = rows.gather(-1, targets[:, None] if targets.dim() == 1 else targets)
        return found.reshape(targets.shape)

    def backward(self, request: ScoreRequest, cotangent: Tensor) -> Tensor:
        """``d sum(g logprob) / d logits[x]``, the sum of ``g (onehot(target) - softmax(logits[x] / T)) / T`` after x."""
        tokens, targets = request.tokens, request.targets
        g, t = cotangent.double().reshape(len(tokens), -1), targets.reshape(len(tokens), -1)
        rows = -g.sum(-1, keepdim=True) * (self.logits / request.temperature).softmax(-1)[tokens]
        rows = rows.scatter_add(-1, t, g) / request.temperature
        return torch.zeros_like(self.logits).index_add(0, tokens, rows)

    def adamw(self, gradient: Tensor, params: AdamParams) -> None:
        """One step, as arXiv:1711.05101, algorithm 2, has it (decay times the learning rate)."""
        self.steps += 1
        self.first = params.beta1 * self.first + (1 - params.beta1) * gradient
        self.second = params.beta2 * self.second + (1 - params.beta2) * gradient.square()
        mean = self.first / (1 - params.beta1**self.steps)
        spread = (self.second / (1 - params.beta2**self.steps)).sqrt() + params.eps
        decayed = self.logits * (1 - params.learning_rate * params.weight_decay)
        self.logits = decayed - params.learning_rate * mean / spread

    def complete(
        self, last: int, params: SamplingParams, stop: frozenset[int], uniforms: Random
    ) -> tuple[list[int], list[float], list[float]]:
        """Draw tokens after ``last``; return them and their log-probs under the untempered and the tempered table."""
        tokens, logprobs, tempered = list[int](), list[float](), list[float]()
        how = RowParams.of([params], self.logits)
        while len(tokens) < params.max_tokens and not (tokens and last in stop):
            row = self.logits[last]
            last = int(choose_tokens(row[None], how, [uniforms.random()]))
            tokens.append(last)
            logprobs.append(float(row.log_softmax(-1)[last]))
            tempered.append(float((row / (params.temperature or 1.0)).log_softmax(-1)[last]))
        return tokens, logprobs, tempered
