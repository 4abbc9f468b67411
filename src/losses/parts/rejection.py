"""Rejection: which tokens or sequences are dropped because sampler and trainer disagree on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch.token_batch import TokenBatch
from ..checks import choice, number
from ..functional.kl import kl

__all__ = ["Rejection", "bound"]

Statistic = Literal["ratio", "k2", "k3"]
RejectionLevel = Literal["token", "sum", "mean", "worst"]


@final
@dataclass(frozen=True)
class Rejection:
    """A filter: what lies outside of [low, high] gets the weight 0, and everything else keeps its own.

    Args:
        statistic: ``ratio``: old / sampler, tested in log space. ``k2``, ``k3``: the estimate of KL(sampler || old) of
            `functional.kl`, which is never negative.
        level: ``token``: each token by itself. ``sum``, ``mean``: a sequence by the sum or the mean over its trained
            tokens; of a ratio these are of its log, that is the product and the geometric mean. ``worst``: a sequence as
            soon as one of its trained tokens lies outside.
        low, high: what is kept, both ends included; ratios, or nats for k2 and k3. Infinity is no bound.

    Raises:
        ConfigError: a field is unknown, the range is empty, it would drop what both policies agree on, or it keeps
            everything.
    """

    statistic: Statistic = "ratio"
    level: RejectionLevel = "mean"
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        choice("statistic of a rejection", self.statistic, get_args(Statistic))
        choice("level of a rejection", self.level, get_args(RejectionLevel))
        number("low of a rejection", self.low, low=0.0, strict=False)
        bound("high of a rejection", self.high)
        agreed = 1.0 if self.statistic == "ratio" else 0.0
        if not self.low <= agreed <= self.high:
            raise ConfigError(
                f"Rejection({self.statistic!r}, low={self.low:g}, high={self.high:g}) drops what sampler and trainer agree "
                f"on, whose {self.statistic} is {agreed:g}"
            )
        if self.low == 0.0 and self.high == math.inf:
            raise ConfigError("a rejection without low and high keeps everything; give a bound, or leave it out")

    def kept(self, batch: TokenBatch, log_ratio: Tensor) -> Tensor:
        """Return what is kept; bool, broadcasts over the tokens.

        Args:
            batch: the tensors.
            log_ratio: old - sampler of each token, nats, exactly 0 where nothing is trained.
        """
        values = log_ratio if self.statistic == "ratio" else kl(-log_ratio, 0.0, self.statistic)
        if self.level == "token":
            return ~self._outside(values)
        if self.level == "worst":
            per_row = batch.layout.row_sums(self._outside(values).to(log_ratio.dtype)) == 0
        else:
            sums = batch.layout.row_sums(values)
            per_row = ~self._outside(sums if self.level == "sum" else sums / batch.tokens_per_sequence.clamp(min=1))
        return batch.layout.spread(per_row, log_ratio.dim())

    def _outside(self, values: Tensor) -> Tensor:
        low, high = self.low, self.high
        if self.statistic == "ratio":
            low, high = math.log(low) if low else -math.inf, math.log(high)
        return torch.logical_or(values < low, values > high)


def bound(name: str, value: object) -> None:
    """Check an upper bound: a number of at least 0, or infinity.

    Raises:
        ConfigError: it is something else.
    """
    if value != math.inf:
        number(name, value, low=0.0, strict=False)
