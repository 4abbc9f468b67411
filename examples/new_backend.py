"""A new backend is an engine: six methods, and `Backend` brings the verbs, checks, futures and normalisation.

The model here predicts a token from the one before it, by a table of logits that PyTorch differentiates and steps.
`check_backend` then tests the promises of any backend.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from pullback.backends import (
    AdamParams,
    Backend,
    Divisor,
    Engine,
    EngineLimits,
    Gradient,
    Ledger,
    PreparedCall,
    ScoreRequest,
    evaluate_all,
    summarize,
)
from pullback.errors import CheckpointError
from pullback.testing import BackendUnderTest, check_backend

VOCAB = 17


@final
class BigramEngine(Engine):
    """Logits of the next token by the token before it, [V, V], trained by ``torch.optim.AdamW``."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.limits = EngineLimits(vocab_size=VOCAB)
        self.table = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
        self.adamw = torch.optim.AdamW([self.table])
        self.saved: dict[str, tuple[Tensor, Tensor | None, dict[str, object], Ledger]] = {}

    def score(self, call: PreparedCall) -> list[Tensor]:
        with torch.no_grad():
            return [self.logprobs(request) for request in call.requests]

    def accumulate(self, call: PreparedCall) -> Gradient:
        with torch.enable_grad():
            logprobs = [self.logprobs(request) for request in call.requests]
        cotangents = evaluate_all(call, logprobs)  # the loss, on detached leaves: it never sees the model
        (added,) = torch.autograd.grad(logprobs, [self.table], list(cotangents.by_datum.values()))
        self.table.grad = added if self.table.grad is None else self.table.grad + added
        return Gradient(
            output=call.output(logprobs, summarize([cotangents])),
            tokens=cotangents.tokens,
            sequences=cotangents.sequences,
            denominator=cotangents.denominator,
            count=cotangents.count,
        )

    def step(self, params: AdamParams, divisor: Divisor) -> Mapping[str, float]:
        assert self.table.grad is not None, "Backend makes no step on an empty accumulation"
        self.table.grad /= divisor.value
        norm = torch.nn.utils.clip_grad_norm_([self.table], params.grad_clip_norm or float("inf"))
        self.adamw.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self.adamw.step()
        self.weights_version += 1
        self.clear()
        return {"grad_norm": float(norm)}

    def clear(self) -> None:
        self.table.grad = None

    def save(self, name: str, overwrite: bool, ledger: Ledger) -> str:
        if name in self.saved and not overwrite:
            raise CheckpointError(f"there is a checkpoint {name!r} already; choose another name or overwrite=True")
        state = (self.table.detach(), self.table.grad, self.adamw.state_dict(), ledger)
        self.saved[name] = copy.deepcopy(state)
        return name

    def load(self, path: str, everything: bool) -> Ledger:
        if path not in self.saved:
            raise CheckpointError(f"there is no checkpoint {path!r}")
        table, gradient, optimizer, ledger = copy.deepcopy(self.saved[path])
        with torch.no_grad():
            self.table.copy_(table)
        self.adamw = torch.optim.AdamW([self.table])
        self.clear()
        if not everything:
            return Ledger()
        self.adamw.load_state_dict(optimizer)
        self.table.grad = gradient
        return ledger

    def logprobs(self, request: ScoreRequest) -> Tensor:
        """Log-probs of the targets, [T] or [T, K]."""
        rows, targets = self.table.log_softmax(-1)[request.tokens], request.targets
        return rows.gather(-1, targets.reshape(len(rows), -1)).reshape(targets.shape)


broken = check_backend(BackendUnderTest(lambda: Backend(BigramEngine()), vocab_size=VOCAB))
assert not broken, broken
print("every promise is kept")
