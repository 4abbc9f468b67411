"""A journal that was damaged while no server ran: the next one answers as before, or says in words why it cannot."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served.damage import FILES, Golden, cut, flipped, letter, settled
from tiers import SOAK, TIER

from pullback.service.durability import answers, database, integrity, journal

FLIPS = 2000 if SOAK else {"quick": 8, "all": 60}[TIER]
CUTS = 200 if SOAK else {"quick": 4, "all": 12}[TIER]
Damage = Callable[[Path], Any]
LETTERS = [letter(text, which) for text in (b"crimson", b"vermilion") for which in range(2)]
STATEMENTS = [letter(text, which, 0x80) for text in (b"CREATE", b"operations", b"owner TEXT") for which in range(2)]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(tmp_path_factory.mktemp("golden"))


def at_random(golden: Golden, flips: int, cuts: int) -> list[Damage]:
    """Return damages of the file, of its log, and of the file after the log was written back, in turn."""
    chance, found = random.Random(0), list[Damage]()
    sizes = {name: (golden.folder / name).stat().st_size for name in FILES}
    for i in range(flips + cuts):
        name, after = FILES[i % 3 % 2], settled if i % 3 == 2 else (lambda damage: damage)
        place = chance.randrange(sizes[name])
        found.append(after(flipped(name, place, chance.randrange(1, 256)) if i < flips else cut(name, place)))
    return found


def test_a_byte_or_an_end_that_is_lost_is_never_a_wrong_answer(golden: Golden, capsys: Any) -> None:
    """Flips of any byte and cuts at any place, of the file and its log."""
    outcomes: Counter[str] = Counter()
    for damage in [*LETTERS, *STATEMENTS, *at_random(golden, FLIPS, CUTS)]:
        given = golden.asked(damage)
        assert golden.wrong(given) == []
        same = given == golden.answers
        outcomes["refused to start" if isinstance(given, str) else "answered as before" if same else "said so"] += 1
    assert outcomes["answered as before"]
    assert outcomes["said so"]
    if SOAK:
        with capsys.disabled():
            print(f"\n{FLIPS} flips and {CUTS} cuts of the journal: {dict(outcomes)}")


def test_without_checksums_there_are_wrong_answers(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: SQLite's own check does not see a letter that is another one."""
    for module in (answers, database, integrity, journal):
        monkeypatch.setattr(module, "is_whole", lambda computed, written: True)
    assert any(golden.wrong(golden.asked(damage)) for damage in LETTERS)
