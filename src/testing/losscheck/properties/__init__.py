"""What every sound loss has, by theme."""

from __future__ import annotations

from typing import Final

from ..results import Property
from .batches import BATCHES
from .conduct import CONDUCT
from .edges import EDGES
from .gradients import GRADIENTS
from .masking import MASKING
from .selection import ALIGNMENT, SELECTION
from .shift import SHIFT

__all__ = ["LOSS_PROPERTIES"]

LOSS_PROPERTIES: Final[dict[str, Property]] = {
    each.name: each for each in (*GRADIENTS, *SELECTION, *MASKING, *ALIGNMENT, *BATCHES, *SHIFT, *EDGES, *CONDUCT)
}
