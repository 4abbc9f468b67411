"""Answers do not fill the disk: beyond a size the oldest go, of the keys that have most of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.service.durability import retention
from pullback.service.durability.journal import Journal

SIZES = {"greedy": 100_000, "other": 50_000, "small": 1_000}  # bytes of each of ten answers


@pytest.mark.parametrize("rows_at_once", [1, 100])
def test_the_oldest_go_first(rows_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest stay, and all of whoever has little; that an answer was given stays known."""
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", rows_at_once)
    journal = Journal(tmp_path / "journal.sqlite")
    for i in range(10):
        for owner, size in SIZES.items():
            journal.accept(f"{owner}-{i}", owner, f"queue of {owner}", i, "digest", "kind")
            journal.finish(f"{owner}-{i}", bytes(size))
    assert retention.bound_answers(journal, 10_000_000) == 0
    assert retention.bound_answers(journal, 910_000) == 6 + 1  # 450 kB are left for each of the two
    kept: dict[str, list[int]] = {owner: [] for owner in SIZES}
    for owner in SIZES:
        for i in range(10):
            operation = journal.operation(f"{owner}-{i}")
            assert operation is not None
            assert operation.expired == (operation.answer is None)
            kept[owner] += [] if operation.expired else [i]
    assert kept == {"greedy": [*range(6, 10)], "other": [*range(1, 10)], "small": [*range(10)]}
    assert retention.bound_answers(journal, 910_000) == 0
    journal.close()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 200))
def test_the_share_of_each_key(held: list[int], most: int) -> None:
    """It is as large as it can be, and nobody gives for others who has less."""
    share = retention._largest_share(held, most)
    assert sum(min(size, share) for size in held) <= most
    assert share >= max(held) or sum(min(size, share + 1) for size in held) > most
