"""Sequence terms: the summands of a loss that have one value per sequence, a function of its summed log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from ..aggregation import Aggregation
from ..batch.token_batch import TokenBatch
from .terms import Summand, check_definition
from .token_sum import token_sum, token_values

__all__ = ["SequenceTerm"]


@final
@dataclass(frozen=True, eq=False)
class SequenceTerm(Summand):
    """A summand with one value per sequence, ``definition(sum_t w_t (logprob_t - other_t), *args)``.

    A sequence of which nothing is trained has no value, and does not count.

    Args:
        name: e.g. ``kto``.
        definition: a function of `pullback.losses.functional`, or any other pure one; elementwise in its first argument.
        relative_to: the field of the other log-probs, e.g. ``ref_logprobs``; None for 0.
        args: the definition's other arguments, constants of the differentiation: numbers, and tensors [B].
        aggregation: how the values are put together.
        scale: the summand's coefficient.
        where: of no effect: a sequence counts whole.

    Raises:
        ConfigError: the definition is no function, the aggregation does not fit sequences, or the scale is no finite number.
    """

    name: str
    definition: Callable[..., Tensor]
    relative_to: str | None
    args: tuple[Any, ...]
    aggregation: Aggregation
    scale: float = 1.0
    where: Tensor | None = None

    def __post_init__(self) -> None:
        check_definition(self.definition)
        self._check("sequence")

    def counting(self, where: Tensor | None) -> SequenceTerm:
        return replace(self, where=where)

    def values(self, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            sums = batch.detached().weighted_row_sum(self.relative_to)
            return token_values(sums, self.definition, self.args, batch.tokens_per_sequence)

    def numerator(self, batch: TokenBatch, coefficients: Tensor | None = None) -> Tensor:
        sums = batch.weighted_row_sum(self.relative_to)
        return token_sum(sums, self.definition, self.args, (), batch.tokens_per_sequence, self.scale)
