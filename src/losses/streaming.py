"""TokenStream: a loss's cotangent, a chunk of tokens at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from ..errors import ConfigError, LengthError, LossError
from .aggregation import Aggregation, count_units
from .base import Loss
from .batch import TokenBatch
from .output import LossOutput
from .terms import Counts, Term, check_counts, given_count

__all__ = ["TokenStream"]


@final
class TokenStream:
    """The evaluation of a loss for a caller who learns the log-probs chunk by chunk of tokens.

    A token's cotangent is its local coefficient, known from the masks of the whole batch, times the slope of its own
    value. So the terms are evaluated once per chunk, on the tokens of the chunk only, and joined at the end.

    Args:
        loss: of gradient kind ``constant`` or ``token``.
        batch: the whole batch, with one target per token; its log-probs are placeholders, e.g. zeros.
        counts: totals of the whole step by denominator; with them the cotangent is that of the divided loss.

    Raises:
        ConfigError: a token's gradient depends on more than the token, or ``counts`` is no mapping.
        LengthError: the batch has several targets per token.
        MissingFieldError: the batch lacks an input of the loss.
    """

    def __init__(self, loss: Loss, batch: TokenBatch, counts: Counts | None = None) -> None:
        loss.check_inputs(batch)
        check_counts(counts)
        if loss.gradient_kind not in ("constant", "token"):
            raise ConfigError(
                f"{loss.name} is of gradient kind {loss.gradient_kind!r}: a token's gradient depends on other tokens, so "
                "it cannot be computed chunk by chunk; use Loss.evaluate"
            )
        if batch.logprobs.dim() != 1:
            raise LengthError(f"a TokenStream takes one target per token, got shape {tuple(batch.logprobs.shape)}")
        if loss.main_aggregation.denominator == "weight_sum":
            count_units(batch, "weight_sum")  # refuses what `output` could not divide by
        self._loss, self._batch, self._counts = loss, batch, counts
        self._positions = torch.arange(batch.logprobs.numel(), device=batch.logprobs.device)
        # Kept on the CPU, so that slices of a batch on a device are checked without waiting for it.
        self._missing = torch.ones(batch.logprobs.numel(), dtype=torch.bool)
        self._coefficients: dict[Aggregation, Tensor] = {}
        self._logprobs = torch.empty(0)
        self._terms: tuple[Term, ...] = ()

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
        with torch.enable_grad():
            terms = self._loss.terms(self._batch.select_tokens(places).with_logprobs(leaf[order]))
            self._check_terms(terms, places)
            total = torch.stack([self._share(term, places) for term in terms]).sum()
        (cotangent,) = torch.autograd.grad(total, leaf)
        self._keep(leaf.detach()[order], terms, places)
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
        return self._loss.assemble(self._batch.with_logprobs(self._logprobs), self._terms, self._counts)

    def _resolve(self, at: slice | Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens that ``at`` names, on the batch's device and on the CPU."""
        device = self._positions.device
        try:
            on_cpu = torch.arange(self._missing.numel())[at.cpu() if isinstance(at, Tensor) else at]
        except (IndexError, ValueError) as error:
            raise LengthError(f"the batch has {self._missing.numel()} tokens: {error}") from error
        if logprobs.shape != on_cpu.shape:
            raise LengthError(
                f"logprobs has shape {tuple(logprobs.shape)}, expected {tuple(on_cpu.shape)}: one per token"
            )
        if not bool(self._missing[on_cpu].all()) or on_cpu.unique().numel() < on_cpu.numel():
            raise LossError("a token's cotangent is asked a second time; each token has one place in a stream")
        return (on_cpu.to(device) if isinstance(at, Tensor) else self._positions[at]), on_cpu

    def _share(self, term: Term, places: Tensor) -> Tensor:
        if term.aggregation not in self._coefficients:
            self._coefficients[term.aggregation] = term.aggregation.weighted_coefficients(self._batch)
        numerator = term.weighed(self._coefficients[term.aggregation][places])
        return numerator if self._counts is None else numerator / given_count(term, self._counts)

    def _check_terms(self, terms: tuple[Term, ...], places: Tensor) -> None:
        if any(term.unit != "token" or term.values.shape != places.shape for term in terms):
            raise LossError(f"{self._loss.name} does not give one value per token, so it cannot be streamed")
        if self._terms and [_constants(term) for term in terms] != [_constants(term) for term in self._terms]:
            raise LossError(f"{self._loss.name} has other terms for this chunk of tokens than for the first one")

    def _keep(self, logprobs: Tensor, terms: tuple[Term, ...], places: Tensor) -> None:
        if not self._terms:
            size = self._missing.numel()
            self._logprobs = logprobs.new_zeros(size)
            self._terms = tuple(
                replace(
                    term,
                    values=term.values.detach().new_zeros(size),
                    where=None if term.where is None else term.where.new_zeros(size),
                )
                for term in terms
            )
        self._logprobs[places] = logprobs
        for whole, chunk in zip(self._terms, terms, strict=True):
            whole.values[places] = chunk.values.detach()
            if whole.where is not None and chunk.where is not None:
                whole.where[places] = chunk.where


def _constants(term: Term) -> tuple[object, ...]:
    return term.name, term.aggregation, term.scale, term.where is None
