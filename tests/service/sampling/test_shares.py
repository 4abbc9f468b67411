"""Whose things go when there are too many in memory: an owner's own, unless another holds more than a share."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.service.sampling.shares import Shares


class Use(NamedTuple):
    owner: str
    name: int
    adds: bool


USES = st.lists(st.builds(Use, st.sampled_from("abc"), st.integers(0, 12), st.booleans()), max_size=60)


def lost(shares: Any, uses: list[Use]) -> list[tuple[str, Counter[str], str]]:
    """Who added, what everybody held at that moment, and whose was lost."""
    held: dict[str, str] = {}
    last: dict[str, int] = {}
    found = []
    for moment, (owner, number, adds) in enumerate(uses):
        name = f"{owner}:{number}"
        last[name] = moment
        if not adds:
            assert (shares.get(name) is not None) == (name in held)
            continue
        shares.add(name, owner, object())
        held[name] = owner
        gone = [one for one in held if one not in shares._things]
        for one in gone:
            found.append((owner, Counter(held.values()), held.pop(one)))
            mine = [other for other in held if held[other] == found[-1][2]]
            assert all(last[other] > last[one] for other in mine)  # the one used longest ago goes
    assert len(shares) == len(held)
    return found


def within(total: int, events: list[tuple[str, Counter[str], str]]) -> bool:
    """Whether nobody lost anything to another while he had no more than an equal share."""
    return all(who == loser or held[loser] > total / len(held) for who, held, loser in events)


@given(uses=USES, total=st.integers(1, 8), each=st.none() | st.integers(1, 4))
@settings(max_examples=60)
def test_nobody_loses_a_share_to_another(uses: list[Use], total: int, each: int | None) -> None:
    """An owner loses its own where it has too many; only who has more than an equal share loses by what others add."""
    shares = Shares[object](total, each)
    events = lost(shares, uses)
    assert len(shares) <= total
    held = Counter(owner for owner, _ in shares._things.values())
    assert each is None or not held or max(held.values()) <= each
    assert within(total, events)


class LeastRecentlyUsed:
    """What was used longest ago goes, whosever it is."""

    def __init__(self, total: int) -> None:
        self._things, self._total = OrderedDict[str, object](), total

    def __len__(self) -> int:
        return len(self._things)

    def add(self, name: str, owner: str, thing: object) -> None:
        self._things[name] = thing
        self._things.move_to_end(name)
        while len(self._things) > self._total:
            self._things.popitem(last=False)


def test_the_one_used_longest_ago_would_be_anothers() -> None:
    """Negative control: without owners, a greedy one pushes out what another has just one of."""
    uses = [Use("a", 0, True), *(Use("b", number, True) for number in range(4))]
    assert not within(4, lost(LeastRecentlyUsed(4), uses))
    assert within(4, lost(Shares[object](4), uses))
