"""Correction: weights and filters for tokens that another policy, the sampler, drew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, final, get_args

import torch
from torch import Tensor

from ...errors import ConfigError, DatumError
from ..base import GradientKind
from ..batch.problems import Problem
from ..batch.selection import select, select_
from ..batch.token_batch import TokenBatch
from ..checks import choice, number
from ..evaluation.metrics import DeferredMetric, maximum, mean
from ..functional.correction import masked_weight, truncated_weight
from ..functional.numerics import bounded_exp
from .rejection import Rejection, bound

__all__ = ["CORRECTION_KEYS", "Correction", "Rejection", "check_correction"]

Weight = Literal["truncate", "mask", "none"]
Level = Literal["token", "sequence", "geometric"]
Population = Literal["tokens", "sequences"]
CORRECTION_KEYS: Final = {f"correction_{name}": name for name in ("weight", "level", "low", "high")}
_REJECTION_LEVEL: Final = {"token": "token", "sequence": "sum", "geometric": "mean"}


@final
@dataclass(frozen=True)
class Correction:
    r"""Weigh each token's policy loss by a function of ``exp(old - sampler)``, and drop what has drifted too far.

    For decoupled losses, whose ratio is ``exp(logprob - old)``: the weight accounts for the step from the sampler to the
    recomputed ``old_logprobs``. A loss whose ratio is already against the sampler must not have one, it would count the
    mismatch twice; so ``old_logprobs`` and the sampler's ``logprobs`` are both required. A KL is not weighted. Masks and
    filters leave all counts as they are: what is dropped still counts in a mean.

    At a fixed prefix truncation is biased by ``-E_q[(rho - high)^+ f]`` and a mask by ``-E_q[rho f 1(outside)]``; no weight
    of single tokens corrects the distribution of prefixes, only the product over the sequence does, at a variance that
    grows with its length. A geometric mean is biased as a weight and a good filter.

    Args:
        weight: ``truncate``: clip to [low, high]. ``mask``: 0 outside of [low, high], with the ratio kept inside.
            ``none``: 1; for a filter alone.
        level: of the weight. ``token``; ``sequence``: the product of the ratios over the trained tokens of a sequence, for
            each of its tokens; ``geometric``: their geometric mean.
        low, high: the range; absolute ratios, infinity is no bound. It contains 1.
        reject: a filter, or several, of which all must be passed, on statistics and levels of their own. What is rejected
            still counts in the self-normalisation.
        normalize: divide by the mean weight of the batch given, over its trained ``tokens`` or over its ``sequences`` (the
            population). It couples the whole batch: gradients then depend on how a step is cut into calls.

    Raises:
        ConfigError: a field is out of range, or the combination has no meaning.

    Source: truncation: F. Yao et al., 2025; masks: IcePop, arXiv:2510.18855; decoupled losses: arXiv:2110.00641.
    """

    weight: Weight = "truncate"
    level: Level = "token"
    low: float = 0.0
    high: float = 2.0
    reject: Rejection | tuple[Rejection, ...] | None = None
    normalize: Population | None = None

    def __post_init__(self) -> None:
        choice("weight of a correction", self.weight, get_args(Weight))
        choice("level of a correction", self.level, get_args(Level))
        number("low of a correction", self.low, low=0.0, strict=False)
        bound("high of a correction", self.high)
        if not self.low <= 1.0 <= self.high:
            raise ConfigError(
                f"the range of a correction is in absolute ratios and must contain 1, got low={self.low:g}, "
                f"high={self.high:g}: where sampler and trainer agree the weight is 1"
            )
        if not all(isinstance(each, Rejection) for each in self.rejections):
            raise ConfigError(f"reject must be a Rejection, a tuple of them or None, got {self.reject!r}")
        self._check_combination()

    @classmethod
    def tis(
        cls,
        high: float = 2.0,
        *,
        low: float = 0.0,
        level: Level = "token",
        reject: Rejection | tuple[Rejection, ...] | None = None,
        normalize: Population | None = None,
    ) -> Correction:
        """Return truncated importance sampling, ``clip(rho, low, high)``."""
        return cls("truncate", level, low, high, reject, normalize)

    @classmethod
    def masked(
        cls,
        low: float,
        high: float,
        *,
        level: Level = "token",
        reject: Rejection | tuple[Rejection, ...] | None = None,
        normalize: Population | None = None,
    ) -> Correction:
        """Return masked importance sampling, rho inside [low, high] and 0 outside."""
        return cls("mask", level, low, high, reject, normalize)

    @classmethod
    def icepop(cls, low: float = 0.5, high: float = 5.0) -> Correction:
        """Return IcePop: masked importance sampling of tokens, with the range of its paper."""
        return cls.masked(low, high)

    @classmethod
    def geometric(cls, low: float = 0.99, high: float = 1.01) -> Correction:
        """Return the filter of sequences whose geometric mean ratio is outside [low, high]; the others weigh 1."""
        return cls.rejection(Rejection("ratio", "mean", low, high))

    @classmethod
    def rejection(cls, *reject: Rejection) -> Correction:
        """Return filters without a weight: what passes them all weighs 1."""
        return cls("none", reject=reject if len(reject) != 1 else reject[0])

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """The filters, however many."""
        if self.reject is None:
            return ()
        return self.reject if isinstance(self.reject, tuple) else (self.reject,)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Datum keys that the correction needs."""
        return ("logprobs", "old_logprobs")

    @property
    def gradient_kind(self) -> GradientKind:
        """What a token's weight depends on: its own log-probs, its sequence's, or those of the whole batch."""
        if self.normalize is not None:
            return "batch"
        of_tokens = self.level == "token" and all(each.level == "token" for each in self.rejections)
        return "token" if of_tokens else "sequence"

    def factor(self, batch: TokenBatch) -> Tensor:
        """Return the weight of each token; detached, broadcasts over the log-probs; 0 where it is masked or rejected.

        Raises:
            ConfigError: the batch has several candidates per token, which have no ratio of a sequence.
        """
        return self._factor(batch, self._log_ratio(batch))

    def problems(self, batch: TokenBatch) -> Problem:
        """Return the problem of a log-ratio that is not finite: a range would hide it."""
        present = ~self._log_ratio(batch).isfinite().all()
        return Problem(
            present, lambda: DatumError("old_logprobs or the sampler's logprobs of a trained token are not finite")
        )

    def metrics(self, batch: TokenBatch) -> dict[str, DeferredMetric]:
        """Return what to log of the weights of the trained tokens; ESS / N is ``correction^2 / correction_squared``."""
        log_ratio, count = self._log_ratio(batch), batch.trained_count
        weight = select(self._factor(batch, log_ratio).expand(log_ratio.shape), batch.mask)
        metrics = {
            "correction": mean(weight, count),
            "correction_largest": maximum(weight, count),
            "correction_squared": mean(weight.square(), count),
        }
        if self.weight != "none":
            ratio = bounded_exp(self._by_level(batch, log_ratio))
            outside = ((ratio < self.low) | (ratio > self.high)).to(weight.dtype)
            spread = self._spread(batch, outside, log_ratio.dim()).expand(log_ratio.shape)
            name = "correction_truncated" if self.weight == "truncate" else "correction_masked"
            metrics[name] = mean(select(spread, batch.mask), count)
        if self.rejections:
            dropped = (~self._kept(batch, log_ratio)).expand(log_ratio.shape).to(weight.dtype)
            left = batch.tokens_per_sequence - batch.layout.row_sums(select(dropped, batch.mask))
            there = batch.tokens_per_sequence > 0
            metrics["rejected_tokens"] = mean(select(dropped, batch.mask), count)
            metrics["rejected_sequences"] = mean((there & (left == 0)).double(), there.sum().double())
        return metrics

    def _check_combination(self) -> None:
        if self.weight == "none":
            if not self.rejections:
                raise ConfigError("Correction('none') without reject does nothing; leave the correction out")
            if (self.level, self.low, self.high) != ("token", 0.0, 2.0) or self.normalize is not None:
                raise ConfigError("level, low, high and normalize have no effect without a weight; drop them")
            return
        if self.weight == "mask" and (self.low, self.high) == (0.0, math.inf):
            raise ConfigError("a mask without low and high masks nothing; give a bound, or weight='truncate'")
        if self.normalize is not None:
            choice("normalize of a correction", self.normalize, get_args(Population))
        if self.normalize == "sequences" and self.level == "token":
            raise ConfigError("weights of tokens have no mean over sequences; give normalize='tokens'")
        for each in self.rejections:
            same = each.statistic == "ratio" and each.level == _REJECTION_LEVEL[self.level]
            if same and self.normalize is None and self.low <= each.low and each.high <= self.high:
                raise ConfigError(
                    f"the bounds {self.low:g} to {self.high:g} can never matter: reject drops more by the same ratio. Use "
                    f"Correction.masked({each.low:g}, {each.high:g}, level={self.level!r})"
                )

    def _log_ratio(self, batch: TokenBatch) -> Tensor:
        """Return old - sampler of each token, exactly 0 where nothing is trained."""
        if batch.layout.candidates and self.gradient_kind != "token":
            raise ConfigError("several candidates per token have no ratio of a sequence; correct them token by token")
        return batch.remember(
            "log-ratio of old to rollout",
            lambda: select_(batch.given("old_logprobs") - batch.given("rollout_logprobs"), batch.mask),
        )

    def _by_level(self, batch: TokenBatch, log_ratio: Tensor) -> Tensor:
        """Return the log-ratio of each token, or of each sequence, float64 [B]."""
        if self.level == "token":
            return log_ratio
        sums = batch.layout.row_sums(log_ratio)
        return sums if self.level == "sequence" else sums / batch.tokens_per_sequence.clamp(min=1)

    def _spread(self, batch: TokenBatch, values: Tensor, dim: int) -> Tensor:
        return values if self.level == "token" else batch.layout.spread(values, dim)

    def _factor(self, batch: TokenBatch, log_ratio: Tensor) -> Tensor:
        if self.weight == "none":
            return self._kept(batch, log_ratio).to(log_ratio.dtype)
        bounded = truncated_weight if self.weight == "truncate" else masked_weight
        values = bounded(self._by_level(batch, log_ratio), self.low, self.high)
        weight = self._spread(batch, values, log_ratio.dim())
        if self.normalize is not None:
            average = self._average(batch, values, weight.expand(log_ratio.shape))
            weight = weight / torch.where(average > 0, average, torch.ones_like(average)).to(weight.dtype)
        if not self.rejections:
            return weight
        return torch.where(
            self._kept(batch, log_ratio), weight, torch.zeros((), dtype=weight.dtype, device=weight.device)
        )

    def _average(self, batch: TokenBatch, values: Tensor, weight: Tensor) -> Tensor:
        if self.normalize == "tokens":
            return select(weight.to(batch.weight.dtype), batch.mask).sum(dtype=torch.float64) / batch.trained_count
        there = (batch.tokens_per_sequence > 0).double()
        return (values * there).sum() / there.sum()

    def _kept(self, batch: TokenBatch, log_ratio: Tensor) -> Tensor:
        first, *others = (each.kept(batch, log_ratio) for each in self.rejections)
        for kept in others:
            first = first & kept
        return first


def check_correction(correction: object) -> None:
    """Check the correction of a loss.

    Raises:
        ConfigError: it is neither a `Correction` nor None.
    """
    if correction is not None and not isinstance(correction, Correction):
        raise ConfigError(f"correction must be a Correction, e.g. Correction.tis(2.0), or None, got {correction!r}")
