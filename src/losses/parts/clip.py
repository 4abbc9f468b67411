"""ClipRange: the probability ratios within which a policy loss is not clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from ...deprecation import replaced
from ...errors import ConfigError
from ..checks import number

__all__ = ["ClipRange", "check_dual_clip"]


@final
@dataclass(frozen=True)
class ClipRange:
    """A range of absolute probability ratios, ``low <= ratio <= high``.

    Args:
        low: smallest ratio that is not clipped, 0 to 1.
        high: largest ratio that is not clipped, at least 1; infinity clips on one side only.

    Raises:
        ConfigError: not 0 <= low <= 1 <= high.
    """

    low: float
    high: float

    # What other libraries call the two distances from 1, and how they are said here.
    also_called: ClassVar[frozenset[str]] = frozenset({"eps", "epsilon", "epsilon_low", "epsilon_high", "cliprange"})
    written: ClassVar[str] = "ClipRange.from_epsilon(low, high)"

    def __post_init__(self) -> None:
        number("clip range low", self.low, low=0.0, high=1.0, strict=False)
        if isinstance(self.high, bool) or not (isinstance(self.high, (int, float)) and self.high >= 1.0):
            raise ConfigError(
                f"a clip range is in absolute ratios and must contain 1, got high={self.high!r}; for an epsilon of "
                "0.2 write ClipRange.from_epsilon(0.2)"
            )

    @classmethod
    def from_epsilon(cls, low: float, high: float | None = None) -> ClipRange:
        """Return the range (1 - low, 1 + high) of PPO's epsilons; ``high`` is ``low`` unless given."""
        low = number("clip epsilon", low, low=0.0, high=1.0, strict=False)
        high = low if high is None else high
        return cls(1.0 - low, 1.0 + (high if high == math.inf else number("clip epsilon", high, low=0.0, strict=False)))

    @classmethod
    @replaced("losses.ClipRange.from_epsilon")
    def from_offsets(cls, low: float, high: float) -> ClipRange:
        """Deprecated spelling of `from_epsilon`."""
        return cls.from_epsilon(low, high)

    @classmethod
    def from_log(cls, low: float, high: float) -> ClipRange:
        """Return the range (exp(-low), exp(high)), for bounds on the log-ratio."""
        return cls(math.exp(-low), math.exp(high))

    @classmethod
    def of(cls, value: ClipRange | float) -> ClipRange:
        """Return ``value`` as a range; a bare number is an epsilon.

        Raises:
            ConfigError: it is neither.
        """
        if isinstance(value, ClipRange):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"clip must be a ClipRange or an epsilon, got {value!r}")
        return cls.from_epsilon(value)


def check_dual_clip(dual: float | None, clip: ClipRange | None) -> None:
    """Check the bound of dual clipping.

    Raises:
        ConfigError: it is not above 1 and above the range, or there is no range; a token inside the range must not be cut.
    """
    if dual is None:
        return
    number("dual_clip", dual, low=1.0)
    if clip is None:
        raise ConfigError("dual_clip is a second bound on a clipped ratio; without clip there is no first")
    if clip.high != math.inf and dual <= clip.high:
        raise ConfigError(
            f"dual_clip={dual:g} must be above the clip range, whose high is {clip.high:g}: the ratios between them would be "
            "inside the range and yet clipped"
        )
