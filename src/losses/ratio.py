"""Ratios to the anchor policy: clip bands, the clipped surrogate, and what to log of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from ..errors import ConfigError, MissingFieldError
from .base import number
from .batch import TokenBatch
from .kl import kl_value
from .metrics import Metric, maximum, mean, total
from .numerics import EXPONENT_LIMIT, bounded_exp

__all__ = ["DEFAULT_BAND", "RatioBand", "anchor_ratio", "clipped_surrogate", "given", "ratio_metrics"]


@final
@dataclass(frozen=True)
class RatioBand:
    """A clip band of absolute probability ratios, ``low <= ratio <= high``.

    Raises:
        ConfigError: not 0 <= low <= 1 <= high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        number("clip band low", self.low, low=0.0, high=1.0, strict=False)
        if not (isinstance(self.high, (int, float)) and self.high >= 1.0):
            raise ConfigError(
                f"a clip band is in absolute ratios and must contain 1, got high={self.high!r}; for an offset of "
                "0.2 write RatioBand.from_offsets(0.2, 0.2)"
            )

    @classmethod
    def from_offsets(cls, low: float, high: float) -> RatioBand:
        """The band (1 - low, 1 + high): PPO's epsilons."""
        return cls(1.0 - low, 1.0 + high)

    @classmethod
    def from_log(cls, low: float, high: float) -> RatioBand:
        """The band (exp(-low), exp(high)), for bounds on the log-ratio."""
        bounds = torch.tensor([-low, high], dtype=torch.float64).exp().tolist()
        return cls(bounds[0], bounds[1])

    def clips(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """True where the clipped branch is the larger loss; strictly outside the band only."""
        return ((advantages > 0) & (ratio > self.high)) | ((advantages < 0) & (ratio < self.low))


DEFAULT_BAND: Final = RatioBand(0.8, 1.2)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, band: RatioBand | None) -> Tensor:
    r"""Per-token policy loss, ``max(-r A, -clip(r, low, high) A)``; without a band ``-r A``.

    The gradient with respect to the log-prob is ``-r A`` inside the band and on its edge, and 0 where clipped.

    Args:
        ratio: policy / anchor, differentiable, any shape.
        advantages: the same shape; detached here.
        band: absolute bounds, or None.

    Source: PPO, arXiv:1707.06347, equation 7; asymmetric bounds: DAPO, arXiv:2503.14476, equation 10.
    """
    advantages = advantages.detach()
    plain = -ratio * advantages
    if band is None:
        return plain
    clipped = -ratio.detach().clamp(band.low, band.high) * advantages
    return torch.where(band.clips(ratio, advantages), clipped, plain)


def _anchor(batch: TokenBatch) -> Tensor:
    anchor = batch.old_logprobs if batch.old_logprobs is not None else batch.behaviour_logprobs
    if anchor is None:
        raise MissingFieldError("missing required field 'logprobs': the ratio needs the log-probs of the sampler")
    return anchor


def anchor_ratio(batch: TokenBatch) -> Tensor:
    """Return policy / anchor, differentiable, 1 where untrained; the anchor is ``old_logprobs``, else the sampler's."""
    return bounded_exp(batch.policy - batch.select(_anchor(batch)).detach())


def ratio_metrics(batch: TokenBatch, ratio: Tensor, band: RatioBand | None) -> dict[str, Metric]:
    """Ratio, clipping and signal over the trained tokens. ESS / N is ``ratio^2 / ratio_squared``."""
    trained, advantages = batch.trained, batch.select(given(batch.advantages))
    log_ratio = batch.policy - batch.select(_anchor(batch))
    found = {
        "ratio": mean(ratio, trained),
        "ratio_largest": maximum(ratio, trained),
        "ratio_squared": mean(ratio.double().square(), trained),
        "ratio_saturated": total((log_ratio > EXPONENT_LIMIT)[trained].sum()),
        "kl_anchor": mean(kl_value("k3", log_ratio), trained),
        "advantage": mean(advantages, trained),
        "advantage_abs": mean(advantages.abs(), trained),
    }
    if band is not None:
        found["clip_fraction"] = mean(band.clips(ratio, advantages).double(), trained)
    return found


def given(value: Tensor | None) -> Tensor:
    """Return an input that `Loss.evaluate` has checked to be there."""
    assert value is not None, "checked by Loss.evaluate"
    return value
