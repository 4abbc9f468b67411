"""How much one key may hold of what all keys share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["Quota"]


@final
@dataclass(frozen=True)
class Quota:
    """A bound on what all owners hold together, and on what one of them holds.

    Where several keys share the server, an owner may take one more only while it holds less than is left free: one alone gets
    half of all, two get a third each, and there is always room for whoever comes next.

    Args:
        what: it is, in the plural.
        total: of all owners together; None = no bound.
        each: of one owner; None = no bound of its own.
        shared: whether several keys share the server.
        frees: what makes room again, as a sentence.
    """

    what: str
    total: float | None
    each: float | None = None
    shared: bool = False
    frees: str = "try again later"

    def refusal(self, own: float, used: float, more: float = 1, *, reserved: bool = False) -> str | None:
        """Say why an owner may not have more; None: it may.

        Args:
            own: what it holds.
            used: what all owners hold.
            more: what it asks for.
            reserved: it may have what is left free for others.
        """
        if self.each is not None and own + more > self.each:
            return f"this key holds {own:,.0f} {self.what}, and its quota is {self.each:,.0f}; {self.frees}"
        if self.total is None:
            return None
        free = self.total - used
        if more > free:
            return f"this server holds {used:,.0f} {self.what}, and takes {self.total:,.0f}; {self.frees}"
        if self.shared and not reserved and own + more > free:
            return (
                f"this key holds {own:,.0f} {self.what}, and the {free:,.0f} of {self.total:,.0f} that are free are left for "
                f"other keys; {self.frees}"
            )
        return None
