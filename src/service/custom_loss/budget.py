"""How much work and memory one call of a custom loss may take, counted before each operation runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self, final

from torch import Tensor

from ...errors import TooLargeError

__all__ = ["NUMBER_BYTES", "PER_NODE", "Budget", "Cost"]

NUMBER_BYTES: Final = 8  # of every number, whatever its dtype
PER_NODE: Final = 20_000  # element operations that calling anything costs, forward and backward
_BASE_OPERATIONS, _BASE_BYTES = 200_000_000, 1 << 24
_DATUM_OPERATIONS: Final = 1_000_000
_TOKEN_OPERATIONS, _TOKEN_BYTES = 10_000, 2048
_MOST_BYTES: Final = 1 << 31


@final
@dataclass(frozen=True)
class Cost:
    """What one operation takes at most.

    Args:
        numbers: of its results.
        operations: on single elements, forward and backward; one takes about a nanosecond of one core.
    """

    numbers: int = 0
    operations: int = 0


@final
class Budget:
    """What is left of the bytes and element operations of one call, over all of its datums.

    All results count until the call has ended, as the backward pass may need them.

    Args:
        operations: on single elements.
        bytes: of all results.

    Attributes:
        operations, bytes: that were spent.
    """

    def __init__(self, operations: int, bytes: int) -> None:
        self._operations, self._bytes = operations, bytes
        self.operations = self.bytes = 0

    @classmethod
    def of(cls, logprobs: Sequence[Tensor]) -> Self:
        """Return the budget of a call with these log-probs: it grows with what the client has sent."""
        tokens = sum(own.numel() for own in logprobs)
        datums = sum(own.numel() > 0 for own in logprobs)
        operations = _BASE_OPERATIONS + _DATUM_OPERATIONS * datums + _TOKEN_OPERATIONS * tokens
        return cls(operations, min(_MOST_BYTES, _BASE_BYTES + _TOKEN_BYTES * tokens))

    def spend(self, cost: Cost) -> None:
        """Take the cost of an operation that is about to run.

        Raises:
            TooLargeError: there is too little left; nothing was taken.
        """
        operations = self.operations + PER_NODE + cost.operations
        held = self.bytes + NUMBER_BYTES * cost.numbers
        if held > self._bytes:
            raise TooLargeError(
                f"the loss would hold {held} bytes over all datums of this call; this server grants it {self._bytes} "
                "(send fewer datums at once, or make the loss simpler)"
            )
        self.check(operations)
        self.operations, self.bytes = operations, held

    def check(self, operations: int) -> None:
        """Refuse a call that would need so many operations altogether.

        Raises:
            TooLargeError: they are more than the call has.
        """
        if operations > self._operations:
            raise TooLargeError(
                f"the loss would take {operations} element operations over all datums of this call; this server grants it "
                f"{self._operations} (send fewer datums at once, or make the loss simpler)"
            )
