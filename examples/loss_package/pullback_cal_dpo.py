"""Cal-DPO: preference optimisation whose rewards have a scale, not only an order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn.functional import logsigmoid

from pullback.errors import ConfigError, EmptyUnitError
from pullback.losses import Aggregation, Loss, TokenBatch
from pullback.losses.base import GradientKind
from pullback.losses.batch.problems import Problem
from pullback.losses.evaluation.metrics import DeferredMetric, mean
from pullback.losses.evaluation.terms import Summand, Term

__all__ = ["CalDPO", "cal_dpo"]


def cal_dpo(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return both terms of each pair: ``-log sigmoid(h_c - h_r)`` and ``(h_c - 1/(2 beta))^2 + (h_r + 1/(2 beta))^2``.

    Args:
        chosen, rejected: h, the log-ratio of policy to reference of each response, summed over its tokens, nats, [P].
        beta: the weaker the tie to the reference, the larger the log-ratios that are asked for, 1 / (2 beta) and its opposite.

    Returns:
        The contrast and the calibration, [P] each.

    Source: Cal-DPO, arXiv:2412.14516.
    """
    target = 1.0 / (2.0 * beta)
    return -logsigmoid(chosen - rejected), (chosen - target).square() + (rejected + target).square()


@final
@dataclass(frozen=True)
class CalDPO(Loss):
    r"""Calibrated direct preference optimisation, averaged over pairs.

    h = ``sum_t w_t (logprob_t - ref_logprob_t)``. With s the sigmoid, the gradient with respect to a chosen log-prob is
    ``w (-s(h_r - h_c) + 2 calibration (h_c - 1/(2 beta))) / pairs``, of a rejected one
    ``w (s(h_r - h_c) + 2 calibration (h_r + 1/(2 beta))) / pairs``.

    Args:
        beta: the log-ratio of a chosen response is to become 1 / (2 beta), that of a rejected one its opposite; > 0.
        calibration: weight of the squared distances from there, >= 0; 1 in the paper, 0.5 in its authors' code.
        aggregation: ``pair_mean`` or ``sum``.

    Raises:
        EmptyUnitError: (on use) a response has no trained token.

    Source: Cal-DPO, arXiv:2412.14516.
    """

    beta: float = 0.1
    calibration: float = 1.0
    aggregation: Aggregation | str = "pair_mean"

    name: ClassVar[str] = "cal_dpo"
    gradient_kind: ClassVar[GradientKind] = "pair"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2412.14516",)
    required_inputs: ClassVar[tuple[str, ...]] = ("weights", "ref_logprobs")
    optional_inputs: ClassVar[tuple[str, ...]] = ("pair_id", "role")

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"beta must be > 0, got {self.beta}")
        if not self.calibration >= 0:
            raise ConfigError(f"calibration must be >= 0, got {self.calibration}")
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "pair"))

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        contrast, calibration = cal_dpo(*self._log_ratios(batch), self.beta)
        return (
            Term("cal_dpo", contrast, "pair", self.main_aggregation),
            Term("calibration", calibration, "pair", self.main_aggregation, self.calibration),
        )

    def problems(self, batch: TokenBatch) -> Iterable[Problem | None]:
        empty = (batch.tokens_per_sequence == 0).any()
        error = EmptyUnitError("cal_dpo: a response has no trained token; every response needs one")
        return (Problem(empty, lambda: error),)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        chosen, rejected = self._log_ratios(batch)
        return {"log_ratio_chosen": mean(chosen), "log_ratio_rejected": mean(rejected)}

    def _log_ratios(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return h of the chosen and of the rejected responses, float64 [P] each."""
        log_ratios, pairs = batch.weighted_row_sum("ref_logprobs"), batch.pairs
        return log_ratios[pairs.chosen], log_ratios[pairs.rejected]
