"""A loss on one case: its value and gradient, and the case on which it is first tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ...cases import Case, CaseSequence
from ..failures import Failed

__all__ = ["Measured", "kind_case", "leaves_of", "require_connected"]


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """A loss on one case.

    Attributes:
        value: the loss.
        rows: dL/dlogprob, one float64 tensor per sequence.
        loose: sequences whose log-probs the loss is not connected to.
    """

    value: float
    rows: tuple[Tensor, ...]
    loose: tuple[int, ...]

    @property
    def flat(self) -> Tensor:
        """The gradient of all tokens, end to end."""
        return torch.cat(self.rows)


def require_connected(loss: Tensor) -> None:
    """Check that a loss can be differentiated.

    Raises:
        Failed: it has no gradient.
    """
    if not loss.requires_grad:
        raise Failed(
            "the loss is not connected to the log-probs",
            "all of it is detached, or was computed from plain numbers (.item(), .tolist(), no_grad)",
        )


def leaves_of(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the log-probs of a case, one leaf per sequence."""
    return [torch.tensor(list(s.logprobs), dtype=dtype).requires_grad_() for s in case.sequences]


def kind_case(on_policy: bool) -> Case:
    """Return fixed random numbers: two pairs; on policy, or 0.1 nats from it."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int, low: float, high: float) -> list[float]:
        values: list[float] = (
            low + (high - low) * torch.rand(length, generator=generator, dtype=torch.float64)
        ).tolist()
        return values

    sequences = []
    for i, length in enumerate((2, 1, 3, 2)):
        at = draw(length, -3.0, -1.0)
        near = [
            [x + 0.0 * d if on_policy else x + d for x, d in zip(at, draw(length, -0.1, 0.1), strict=True)]
            for _ in "ab"
        ]
        ref = [x + d for x, d in zip(at, draw(length, -0.5, 0.5), strict=True)]
        sequences.append(CaseSequence(at, [1.0] * length, draw(length, 0.5, 2.0), near[0], near[1], ref, i // 2))
    return Case(tuple(sequences), with_old=True)
