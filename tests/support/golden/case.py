"""One of our losses beside one of a peer's recorded answers; see `golden.table`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pullback.losses import Loss

__all__ = ["ALL_ROWS", "FP32", "Case"]

FP32: Final = 1e-6  # where the peer takes exp, or a logsigmoid, in fp32
ALL_ROWS: Final = {"sequences": 4.0}  # the peer counts a masked row as a sequence; we do not, unless told so


@dataclass(frozen=True)
class Case:
    """One of our losses, and how to call it so that it answers what the peer does.

    Args:
        loss: of ours.
        family: the row of the documented table.
        control: another loss of ours, which must not agree.
        tolerance: relative to the larger of 1 and the peer's number.
        counts: given to `evaluate`.
        anchor: the log-probs that the ratio is taken against; the others are withheld.
        only_kl: with advantages of zero, so that the KL is all of the loss.
        groups: prompt group of each row.
    """

    loss: Loss
    family: str
    control: Loss
    tolerance: float = 1e-12
    counts: Mapping[str, float] | None = None
    anchor: str = "old_logprobs"
    only_kl: bool = False
    groups: tuple[int, ...] | None = None
