"""Whose entry is evicted when there are too many: an owner's own, unless another holds more than an equal share."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.service.sampling.fair_cache import FairCache


class Use(NamedTuple):
    owner: str
    name: int
    adds: bool


USES = st.lists(st.builds(Use, st.sampled_from("abc"), st.integers(0, 12), st.booleans()), max_size=60)


def lost(cache: Any, uses: list[Use]) -> list[tuple[str, Counter[str], str]]:
    """Who added, what everybody held at that moment, and whose was lost."""
    held: dict[str, str] = {}
    last: dict[str, int] = {}
    found = []
    for moment, (owner, number, adds) in enumerate(uses):
        name = f"{owner}:{number}"
        last[name] = moment
        if not adds:
            assert (cache.get(name) is not None) == (name in held)
            continue
        cache.add(name, owner, object())
        held[name] = owner
        gone = [one for one in held if one not in cache._entries]
        for one in gone:
            found.append((owner, Counter(held.values()), held.pop(one)))
            mine = [other for other in held if held[other] == found[-1][2]]
            assert all(last[other] > last[one] for other in mine)  # the one used longest ago goes
    assert len(cache) == len(held)
    return found


def within(total: int, events: list[tuple[str, Counter[str], str]]) -> bool:
    """Whether nobody lost anything to another while he had no more than an equal share."""
    return all(who == loser or held[loser] > total / len(held) for who, held, loser in events)


@given(uses=USES, total=st.integers(1, 8), each=st.none() | st.integers(1, 4))
@settings(max_examples=60)
def test_nobody_loses_a_share_to_another(uses: list[Use], total: int, each: int | None) -> None:
    """An owner loses its own where it has too many; only who has more than an equal share loses by what others add."""
    cache = FairCache[object](total, each)
    events = lost(cache, uses)
    assert len(cache) <= total
    held = Counter(owner for owner, _ in cache._entries.values())
    assert each is None or not held or max(held.values()) <= each
    assert within(total, events)


class LeastRecentlyUsed:
    """What was used longest ago goes, whosever it is."""

    def __init__(self, total: int) -> None:
        self._entries, self._total = OrderedDict[str, object](), total

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, owner: str, value: object) -> None:
        self._entries[name] = value
        self._entries.move_to_end(name)
        while len(self._entries) > self._total:
            self._entries.popitem(last=False)


def test_the_one_used_longest_ago_would_be_anothers() -> None:
    """Negative control: without owners, a greedy one pushes out what another has just one of."""
    uses = [Use("a", 0, True), *(Use("b", number, True) for number in range(4))]
    assert not within(4, lost(LeastRecentlyUsed(4), uses))
    assert within(4, lost(FairCache[object](4), uses))
