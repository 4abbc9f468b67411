"""KL penalty to a frozen reference: the value estimator and the gradient mode are separate choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final, get_args

import torch
from torch import Tensor

from ...errors import BiasedGradientError
from ..checks import choice, number
from ..functional.kl import KLEstimator, kl_value

__all__ = ["KL", "KLGradient"]

KLGradient = Literal["reverse", "pathwise", "none"]
_BIASED: Final = {
    "k1": "its expected gradient is exactly zero: the reference has no influence at all",
    "abs": "its gradient is that of neither direction of the KL",
}


@final
@dataclass(frozen=True)
class KL:
    """A KL penalty ``beta * w * K`` with K from `kl_value` and w the detached importance ratio.

    Args:
        estimator: ``k1``, ``k2``, ``k3`` or ``abs``: the value that is reported.
        beta: coefficient, >= 0.
        gradient: ``reverse``: dK/dlogprob = D, with ``importance`` the unbiased gradient of the reverse KL
            (policy || reference), whatever estimator is reported. ``pathwise``: the estimator's own derivative
            (k2: D, biased off-policy; k3: 1 - exp(-D), the gradient of the *forward* KL; k1: 1). ``none``: report only.
        importance: weigh by the detached ratio policy / rollout policy, so that stale samples stay unbiased.
        acknowledge_biased: allow a combination that is known to be wrong (k1 or abs with ``pathwise``).

    Raises:
        BiasedGradientError: k1 or abs with ``pathwise`` and no acknowledgement.
        ConfigError: a field is out of range.
    """

    estimator: KLEstimator = "k3"
    beta: float = 0.04
    gradient: KLGradient = "reverse"
    importance: bool = True
    acknowledge_biased: bool = False

    def __post_init__(self) -> None:
        choice("KL estimator", self.estimator, get_args(KLEstimator))
        choice("KL gradient", self.gradient, get_args(KLGradient))
        number("KL beta", self.beta, low=0.0, strict=False)
        if self.gradient == "pathwise" and self.estimator in _BIASED and not self.acknowledge_biased:
            raise BiasedGradientError(
                f"KL({self.estimator!r}, gradient='pathwise') is not a KL penalty: {_BIASED[self.estimator]}. Use "
                "gradient='reverse' (unbiased), or acknowledge_biased=True to reproduce a published script"
            )

    def penalty(self, logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor) -> Tensor:
        """Return w * K per token, shape of ``logprobs``; beta is the term's scale.

        Args:
            logprobs: current policy, fp32 or better.
            ref_logprobs: the reference; detached here.
            ratio: policy / rollout policy; detached here, ignored without ``importance``.
        """
        log_ratio = logprobs - ref_logprobs.detach()
        weight = ratio.detach() if self.importance else torch.ones_like(log_ratio)
        value = kl_value(self.estimator, log_ratio)
        match self.gradient:
            case "pathwise":
                return weight * value
            case "none":
                return weight * value.detach()
            case "reverse":
                return weight * (value.detach() + log_ratio.detach() * (logprobs - logprobs.detach()))
