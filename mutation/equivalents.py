"""Equivalent mutants: changes that no test can tell from the code, each with the reason."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from .sites import Mutant

__all__ = ["NAMED", "Equivalent", "read"]


@final
@dataclass(frozen=True)
class Equivalent:
    """One or several mutants of a function.

    Attributes:
        function: ``path:qualified name``.
        changes: what `Mutant.change` says of them.
        why: the reason why no test can tell.
    """

    function: str
    changes: tuple[str, ...]
    why: str

    def covers(self, mutant: Mutant) -> bool:
        """Return whether a mutant is one of them."""
        return self.function == f"{mutant.path}:{mutant.function}" and mutant.change in self.changes


def read(path: Path) -> tuple[Equivalent, ...]:
    """Read equivalents from a TOML file."""
    entries = tomllib.loads(path.read_text()).get("equivalent", ())
    return tuple(Equivalent(e["function"], tuple(e["changes"]), e["why"]) for e in entries)


NAMED: Final = read(Path(__file__).with_name("equivalents.toml"))
