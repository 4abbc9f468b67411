"""How far two backends on the same weights may be apart, by the dtype of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from ...errors import ConfigError

__all__ = ["TOLERANCES", "Tolerance", "least_precise", "tolerance_of"]


@final
@dataclass(frozen=True)
class Tolerance:
    """The largest differences that rounding explains.

    Args:
        largest, mean: of log-probs, absolute, nats: any token, and the mean over tokens.
        gradient: of loss, cotangent and gradient, relative.
        update: of the change of log-probs by a step, relative.
    """

    largest: float
    mean: float
    gradient: float
    update: float


# Log-probs: twice what `pullback bench numerics` finds of SmolLM2 (docs/performance.md), more in fp32, where layouts and
# devices differ. Gradients: fifteen times what a random Llama of six layers shows in its worst parameter, as real models
# round more.
TOLERANCES: Final[Mapping[str, Tolerance]] = {
    "float64": Tolerance(1e-6, 1e-7, 1e-6, 1e-5),  # layers of transformers normalise in fp32 whatever the dtype
    "float32": Tolerance(1e-4, 2e-5, 1e-4, 2e-3),
    "float16": Tolerance(1e-1, 1e-2, 5e-2, 1e-1),
    "bfloat16": Tolerance(8e-1, 8e-2, 3e-1, 5e-1),
}


def tolerance_of(*dtypes: str) -> Tolerance:
    """Return the loosest tolerance of several dtypes.

    Raises:
        ConfigError: one of them is not in the table.
    """
    return TOLERANCES[least_precise(*dtypes)]


def least_precise(*dtypes: str) -> str:
    """Return the one of several dtypes whose tolerance is the loosest.

    Raises:
        ConfigError: one of them is not in the table.
    """
    unknown = [dtype for dtype in dtypes if dtype not in TOLERANCES]
    if unknown:
        raise ConfigError(
            f"there is no tolerance for {unknown[0]!r}, only for {', '.join(TOLERANCES)}; give tolerance="
        )
    return max(dtypes, key=lambda dtype: TOLERANCES[dtype].largest)
