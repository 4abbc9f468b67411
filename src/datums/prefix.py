"""What two sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["common_prefix"]


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many elements two texts, or two lists, share from their beginning; slices are compared, which is fast."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
