"""GSPO: the clipped policy gradient whose ratio belongs to a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from ..aggregation import Aggregation, Unit
from ..base import GradientKind, Loss
from ..batch.problems import Problem
from ..batch.selection import wide
from ..batch.token_batch import TokenBatch
from ..checks import choice
from ..config import keys
from ..evaluation.metrics import DeferredMetric
from ..evaluation.terms import Summand, Term, TokenTerm
from ..functional.policy import gspo_token, ppo_clip
from ..parts.clip import ClipRange, check_dual_clip
from ..parts.ratio import ratio_metrics
from ..parts.sequence_ratio import (
    advantage_per_sequence,
    mean_log_ratio,
    sequence_ratio_metrics,
    unequal_advantages,
    without_ratio,
)
from ..registry import register

__all__ = ["GSPO"]


@register
@final
@dataclass(frozen=True)
class GSPO(Loss):
    r"""Clipped policy gradient with one ratio per sequence, ``s = exp(mean_t (logprob_t - anchor_t))``.

    The mean is over the trained tokens, or those of ``sequence_ratio_mask``; one of ``weights`` and that mask is required,
    so that a prompt is not part of it. The anchor is ``old_logprobs`` where given, else the sampler's ``logprobs``. An s is a
    geometric mean, close to 1: an epsilon of 0.2 would be an average drift of 0.18 nats per token, and never clip.

    Args:
        clip: range of s; a bare number is an epsilon. The default is the paper's.
        aggregation: ``sum`` by default, as the protocol has it; the paper's is ``sequence_mean_token_mean`` of the token
            form, ``sequence_mean`` of the sequence form.
        form: ``token``: ``w_t max(-s A_t, -clip(s) A_t)`` for each token, where s has the value of the sequence's ratio and
            the gradient of the token's; the gradient is ``-w A_t s``, 0 where clipped. ``sequence``: ``max(-s A, -clip(s) A)``
            times the mean weight, once for each sequence; the gradient is ``-A s / n`` at the n tokens of the ratio. It takes
            one advantage per sequence. Averaged by ``sequence_mean_token_mean`` the token form has the gradient of the
            averaged sequence form.
        dual_clip: c > 1: the loss where A < 0 is at most c |A|; it must lie above the range. None: no bound.

    Raises:
        DatumError: (on use) the sequence form, and the advantages of a sequence differ; or ``sequence_ratio_mask`` has a
            token that is not trained, whose log-prob need not be known.
        EmptyUnitError: (on use) a sequence is trained but has no token in its ``sequence_ratio_mask``.
        MissingFieldError: (on use) neither ``weights`` nor ``sequence_ratio_mask`` is given.

    Source: GSPO, arXiv:2507.18071, equations 5 and 13 (the token form).
    """

    clip: ClipRange | float = keys(
        ClipRange.from_epsilon(3e-4, 4e-4), ClipRange, clip_low_threshold="low", clip_high_threshold="high"
    )
    aggregation: Aggregation | str = "sum"
    form: Literal["token", "sequence"] = "token"
    dual_clip: float | None = None

    name: ClassVar[str] = "gspo"
    gradient_kind: ClassVar[GradientKind] = "sequence"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2507.18071", "Tinker training API, losses: gspo")
    required_inputs: ClassVar[tuple[str, ...]] = ("advantages", "logprobs")
    optional_inputs: ClassVar[tuple[str, ...]] = ("weights", "old_logprobs", "sequence_ratio_mask", "group_id")

    @property
    def unit(self) -> Unit:
        return self.form

    def __post_init__(self) -> None:
        choice("form of gspo", self.form, ("token", "sequence"))
        object.__setattr__(self, "clip", ClipRange.of(self.clip))
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, self.form))
        check_dual_clip(self.dual_clip, self._clip)

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        bounds = (self._clip.low, self._clip.high, self.dual_clip)
        log_ratio = mean_log_ratio(batch)
        if self.form == "token":
            per_row = log_ratio.detach().to(wide(batch.logprobs).dtype)
            per_token = batch.layout.spread(per_row, batch.logprobs.dim())
            return (
                TokenTerm("policy", gspo_token, (per_token, batch.given("advantages"), *bounds), self.main_aggregation),
            )
        values = ppo_clip(log_ratio, 0.0, advantage_per_sequence(batch), *bounds)
        return (Term("policy", values * self._weight(batch), "sequence", self.main_aggregation),)

    def problems(self, batch: TokenBatch) -> Iterable[Problem | None]:
        unequal = unequal_advantages(batch, self.name) if self.form == "sequence" else None
        return unequal, *without_ratio(batch, self.name)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        return {**ratio_metrics(batch, None), **sequence_ratio_metrics(batch, self._clip, self.dual_clip)}

    @property
    def _clip(self) -> ClipRange:
        return ClipRange.of(self.clip)

    @staticmethod
    def _weight(batch: TokenBatch) -> Tensor:
        """Return the mean weight of each sequence's trained tokens, 0 where none is."""
        return batch.weight_per_sequence / batch.tokens_per_sequence.clamp(min=1)
