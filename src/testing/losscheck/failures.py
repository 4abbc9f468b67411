"""What a property says of a loss that does not have it, or of which it says nothing."""

from __future__ import annotations

from ..cases import Case

__all__ = ["Failed", "NotApplicable"]


class Failed(Exception):
    """A property does not hold; the message is a sentence that says how it is seen.

    Args:
        sentence: what was found.
        cause: what probably makes it so; absent: the property's usual causes.
        case: the batch that shows it, where the property has numbers of its own.
    """

    def __init__(self, sentence: str, cause: str | None = None, case: Case | None = None) -> None:
        super().__init__(sentence)
        self.cause = cause
        self.case = case


class NotApplicable(Exception):
    """A property says nothing about this loss; the message says why."""
