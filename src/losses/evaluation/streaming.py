"""TokenStream: a loss's cotangent, a chunk of tokens at a time."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ...errors import ConfigError, LengthError, LossError
from ..aggregation import Aggregation
from ..base import Loss
from ..batch.layout import Packed
from ..batch.problems import Problem, raise_readable
from ..batch.token_batch import TokenBatch
from ..counts import Count, Counts, check_counts, denominators_of, given_count, require_counts
from ..inputs import INPUTS, TOKEN_INPUTS
from ..kind import trusted_kind
from .evaluate import part_of, put_together
from .output import LossOutput
from .terms import Summand, Term

__all__ = ["TokenStream", "select_tokens"]


@final
class TokenStream:
    """The evaluation of a loss for a caller who learns the log-probs chunk by chunk of tokens.

    A token's cotangent is its local coefficient, known from the masks of the whole batch, times the slope of its own
    value. So the terms are evaluated once per chunk, on the tokens of the chunk only, and joined at the end.

    Args:
        loss: of gradient kind ``constant`` or ``token``.
        batch: the whole batch, packed, with one target per token; its log-probs are placeholders, e.g. zeros.
        counts: totals of the whole step by denominator; with them the cotangent is that of the divided loss.

    Raises:
        ConfigError: a token's gradient depends on more than the token, or ``counts`` is no mapping.
        LengthError: the batch is not packed, or has several targets per token.
        MissingFieldError: the batch lacks an input of the loss.
    """

    def __init__(self, loss: Loss, batch: TokenBatch, counts: Counts | None = None) -> None:
        loss.check_inputs(batch)
        check_counts(counts)
        kind = trusted_kind(loss)
        if kind not in ("constant", "token"):
            raise ConfigError(
                f"{loss.name} is of gradient kind {kind!r}: a token's gradient depends on other tokens, so "
                "it cannot be computed chunk by chunk; use Loss.evaluate"
            )
        if not isinstance(batch.layout, Packed) or batch.layout.candidates:
            raise LengthError(f"a TokenStream takes packed tokens of one target, got shape {batch.layout.shape}")
        self._loss, self._batch, self._counts = loss, batch, counts
        self._layout = batch.layout
        self._positions = torch.arange(batch.logprobs.numel(), device=batch.logprobs.device)
        # Kept on the CPU, so that slices of a batch on a device are checked without waiting for it.
        self._missing = torch.ones(batch.logprobs.numel(), dtype=torch.bool, device="cpu")
        self._coefficients: dict[Aggregation, Tensor] = {}
        self._logprobs = torch.zeros_like(batch.logprobs)
        self._numerators: list[Tensor] = []
        self._terms: tuple[Summand, ...] = ()  # of the first chunk, which the others must be like
        self._where: dict[str, Tensor] = {}

    def cotangent(self, logprobs: Tensor, at: slice | Tensor) -> Tensor:
        """Return the derivative of the sum of the numerators (with ``counts``, of the divided loss) at some tokens.

        Args:
            logprobs: [n], nats; the log-probs of these tokens.
            at: which tokens of the batch they are: a slice, or int64 [n] in any order, or a bool mask [N].

        Returns:
            dL/dlogprob, shape and dtype of ``logprobs``.

        Raises:
            LengthError: ``logprobs`` is not one number per token of ``at``, or a token is not in the batch.
            LossError: a token is asked a second time.
        """
        index, on_cpu = self._resolve(at, logprobs)
        leaf = logprobs.detach().requires_grad_()
        order = index.argsort() if isinstance(at, Tensor) else slice(None)
        places = index[order]
        chunk = select_tokens(self._batch, places)
        with torch.enable_grad():
            chunk = chunk.with_logprobs(leaf[order])
            terms = self._loss.terms(chunk)
            self._check_terms(terms, chunk)
            numerators = [term.numerator(chunk, self._coefficient(term)[places]) for term in terms]
            divisors = [self._divisor(term) for term in terms]
            total = torch.stack([n / d for n, d in zip(numerators, divisors, strict=True)]).sum()
        (cotangent,) = torch.autograd.grad(total, leaf)
        self._logprobs[places] = leaf.detach()[order].to(self._logprobs.dtype)
        before = self._numerators or [torch.zeros_like(n) for n in numerators]
        self._numerators = [n.detach() + b for n, b in zip(numerators, before, strict=True)]
        self._keep(terms, places)
        self._missing[on_cpu] = False
        return cotangent

    def output(self) -> LossOutput:
        """Return what `Loss.evaluate` returns, for the whole batch; its tensors have no graph.

        Raises:
            LossError: some tokens were never asked for.
        """
        missing = self._missing.nonzero().squeeze(1)
        if missing.numel():
            raise LossError(
                f"{missing.numel()} of {self._missing.numel()} tokens have no log-probs yet, the first at "
                f"{int(missing[0])}; ask for the cotangent of every token first"
            )
        if not self._terms:  # a batch without tokens
            self.cotangent(self._batch.logprobs, slice(0, 0))
        whole = self._batch.with_logprobs(self._logprobs)
        parts = []
        problems: list[Problem | None] = [*whole.problems(), *self._loss.problems(whole)]
        for term, numerator in zip(self._terms, self._numerators, strict=True):
            joined = term.counting(self._where.get(term.name))
            part, problem = part_of(joined, numerator, whole, self._counts, divided=False)
            parts.append(part)
            problems.append(problem)
        deferred = raise_readable(problems)
        with torch.no_grad():
            return put_together(self._loss, whole, lambda: self._loss.terms(whole), tuple(parts), deferred)

    def _resolve(self, at: slice | Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens that ``at`` names, on the batch's device and on the CPU."""
        device = self._positions.device
        try:
            on_cpu = torch.arange(self._missing.numel(), device="cpu")[at.cpu() if isinstance(at, Tensor) else at]
        except (IndexError, ValueError) as error:
            raise LengthError(f"the batch has {self._missing.numel()} tokens: {error}") from error
        if logprobs.shape != on_cpu.shape:
            raise LengthError(
                f"logprobs has shape {tuple(logprobs.shape)}, expected {tuple(on_cpu.shape)}: one per token"
            )
        if not bool(self._missing[on_cpu].all()) or on_cpu.unique().numel() < on_cpu.numel():
            raise LossError("a token's cotangent is asked a second time; each token has one place in a stream")
        return (on_cpu.to(device) if isinstance(at, Tensor) else self._positions[at]), on_cpu

    def _coefficient(self, term: Summand) -> Tensor:
        """Return c of every token, as the whole batch has it; [N]."""
        if term.aggregation not in self._coefficients:
            per_row = term.aggregation.row_coefficients(self._batch)
            ones = torch.ones(self._layout.shape, dtype=torch.float64, device=self._positions.device)
            self._coefficients[term.aggregation] = ones if per_row is None else self._layout.spread(per_row, 1)
        return self._coefficients[term.aggregation]

    def _divisor(self, term: Summand) -> Count:
        return 1.0 if self._counts is None else given_count(term, self._counts)

    def _check_terms(self, terms: tuple[Summand, ...], chunk: TokenBatch) -> None:
        for term in terms:
            if isinstance(term, Term) and (term.unit != "token" or term.unreduced.shape != chunk.logprobs.shape):
                raise LossError(f"{self._loss.name} does not give one value per token, so it cannot be streamed")
        if not self._terms:
            require_counts(self._loss.name, denominators_of(terms), self._counts)
        elif [_constants(term) for term in terms] != [_constants(term) for term in self._terms]:
            raise LossError(f"{self._loss.name} has other terms for this chunk of tokens than for the first one")

    def _keep(self, terms: tuple[Summand, ...], places: Tensor) -> None:
        self._terms = self._terms or terms
        for term in terms:
            if term.where is not None:
                whole = self._where.setdefault(term.name, torch.zeros_like(self._positions, dtype=torch.bool))
                whole[places] = term.where


def _constants(term: Summand) -> tuple[object, ...]:
    return term.name, term.aggregation, term.scale, term.where is None


def select_tokens(batch: TokenBatch, at: Tensor) -> TokenBatch:
    """Return a packed batch of some of the tokens of a packed one; every sequence stays, with fewer tokens or none.

    Args:
        batch: the whole batch.
        at: int64 [n]; positions of the tokens, ascending.
    """
    layout = batch.layout
    assert isinstance(layout, Packed), "only packed batches are streamed"
    row = layout.index[at]
    counts = torch.zeros_like(layout.offsets).index_add(0, row + 1, torch.ones_like(row))
    chosen = {name: getattr(batch, name) for name in INPUTS}
    for name in TOKEN_INPUTS:
        chosen[name] = None if chosen[name] is None else chosen[name][at]
    logprobs = batch.logprobs[at]
    return TokenBatch(logprobs, Packed(logprobs.shape, counts.cumsum(0), row), **chosen)
