"""The bug museum: every defect is found by the check that it belongs to, and every repair passes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pullback.testing.losscheck import LOSS_PROPERTIES, search
from pullback.testing.museum import EXHIBITS, Exhibit, examine
from pullback.testing.museum.page import museum_page

PAGE = Path(__file__).parents[2] / "docs" / "museum.md"


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: f"{exhibit.kind}: {exhibit.name}")
def test_museum(exhibit: Exhibit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken piece raises the alarm that names its cause; the repaired one raises none."""
    if exhibit.kind == "model":
        pytest.importorskip("peft", reason="checks of models need transformers and peft (extra hf)")
    monkeypatch.setattr(search, "_SHRINKING", 10)  # the smallest example is another test's
    broken = examine(exhibit)
    assert broken.found
    assert exhibit.cause in broken.sentence
    repaired = examine(exhibit, exhibit.repaired)
    assert not repaired.found, repaired.sentence


def test_enough_defects() -> None:
    """All kinds are there, no name is used twice, and nearly every property of a loss has a defect that it finds."""
    counts = Counter(exhibit.kind for exhibit in EXHIBITS)
    assert sum(counts.values()) >= 42
    assert min(counts[kind] for kind in ("loss", "data", "model")) >= 6
    assert len({exhibit.name for exhibit in EXHIBITS}) == len(EXHIBITS)
    found = {exhibit.found_by for exhibit in EXHIBITS if exhibit.kind == "loss"}
    assert set(LOSS_PROPERTIES) - found <= {"pairs_by_id", "precision"}


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_page() -> None:
    """The page is the one that is made from the exhibits; a defect that is edited would change it."""
    page = museum_page(EXHIBITS)
    assert PAGE.read_text() == page, "write it anew: python -m pullback.testing.museum.page > docs/museum.md"
    assert museum_page(EXHIBITS[:1]) != page
    assert all(exhibit.harm in page for exhibit in EXHIBITS)
