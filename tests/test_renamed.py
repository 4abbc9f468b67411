"""Renamed public names: each old spelling works, warns, and stands in the table of CHANGELOG.md."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import pullback

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def renamed() -> Iterator[tuple[str, str, str]]:
    """Module, old name and new spelling of all that `deprecation.moved` still finds."""
    for found in pkgutil.walk_packages(pullback.__path__, "pullback."):
        if found.name.endswith("__main__"):
            continue
        try:
            find = getattr(importlib.import_module(found.name), "__getattr__", None)
        except ImportError:
            continue  # an optional library is not installed
        names = inspect.getclosurevars(find).nonlocals.get("names", {}) if inspect.isfunction(find) else {}
        for old, (home, new) in names.items():
            yield found.name, old, f"pullback.{home}.{new}"


def unlisted(table: str, names: list[tuple[str, str, str]]) -> list[str]:
    """Rows that the table lacks; a whole module that moved needs one row."""
    return [f"| `{m}.{old}` | `{new}` |" for m, old, new in names if not {f"`{m}.{old}`", f"`{m}`"} & set(cells(table))]


def cells(table: str) -> list[str]:
    return [cell.strip() for line in table.splitlines() if line.startswith("|") for cell in line.split("|")]


@pytest.mark.skipif(not CHANGELOG.is_file(), reason="needs the source tree")
def test_old_spellings_work_and_are_listed() -> None:
    """An old name is what the new one is, says so, and has a row; a missing row is noticed."""
    names = list(renamed())
    assert names
    for module, old, new in names:
        home, _, name = new.rpartition(".")
        with pytest.warns(DeprecationWarning, match="is now"):
            assert getattr(importlib.import_module(module), old) is getattr(importlib.import_module(home), name)
    assert unlisted(CHANGELOG.read_text(), names) == []
    assert unlisted(
        "| `pullback.a` | |\n| `pullback.b.Old` | |", [("pullback.a", "X", "n"), ("pullback.b", "Y", "n")]
    ) == ["| `pullback.b.Y` | `n` |"]
