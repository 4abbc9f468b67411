"""The bug museum: every defect is found by the check that it belongs to, and every repair passes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiers import TIER

from pullback.testing.losscheck import LOSS_PROPERTIES, search
from pullback.testing.museum import EXHIBITS, Exhibit, examine
from pullback.testing.museum.page import museum_page

QUICK_MODELS = ("positions run on", "window lost where rows are packed", "dropout in evaluation")
PAGE = Path(__file__).parents[2] / "docs" / "museum.md"


def rows() -> list[Any]:
    """All exhibits; of the models, which take longest, the quick tier has a sample."""
    marks = [[pytest.mark.slow] if e.kind == "model" and e.name not in QUICK_MODELS else [] for e in EXHIBITS]
    named = zip(EXHIBITS, marks, strict=True)
    return [pytest.param(e, marks=mark, id=f"{e.kind}: {e.name}") for e, mark in named]


@pytest.mark.parametrize("exhibit", rows())
def test_museum(exhibit: Exhibit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken piece raises the alarm that names its cause; the repaired one raises none."""
    if exhibit.kind == "model":
        pytest.importorskip("peft", reason="checks of models need transformers and peft (extra hf)")
    monkeypatch.setattr(search, "_SHRINKING", 0)  # the smallest example is another test's
    broken = examine(exhibit, examples=6)
    assert broken.found
    assert exhibit.cause in broken.sentence
    if exhibit.kind == "backend":
        return  # the repaired one is the same for all, and passes every check in test_backend_museum.py
    repaired = examine(exhibit, exhibit.repaired, examples=6 if TIER != "quick" else 3)
    assert not repaired.found, repaired.sentence


def test_enough_defects() -> None:
    """All kinds are there, no name is used twice, and nearly every property of a loss has a defect that it finds."""
    counts = Counter(exhibit.kind for exhibit in EXHIBITS)
    assert sum(counts.values()) >= 42
    assert min(counts[kind] for kind in ("loss", "data", "model", "backend")) >= 6
    assert len({(exhibit.kind, exhibit.name) for exhibit in EXHIBITS}) == len(EXHIBITS)
    found = {exhibit.found_by for exhibit in EXHIBITS if exhibit.kind == "loss"}
    assert set(LOSS_PROPERTIES) - found <= {"pairs_by_id", "precision"}


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_page() -> None:
    """The page is the one that is made from the exhibits; a defect that is edited would change it."""
    page = museum_page(EXHIBITS)
    assert PAGE.read_text() == page, "write it anew: python -m pullback.testing.museum.page > docs/museum.md"
    assert museum_page(EXHIBITS[:1]) != page
    assert all(exhibit.harm in page for exhibit in EXHIBITS)
