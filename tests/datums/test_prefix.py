"""What two sequences share from their beginning."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pullback.datums.prefix import common_prefix


@given(both=st.text("ab", max_size=20), a=st.text("ab", max_size=5), b=st.text("ab", max_size=5))
def test_common_prefix(both: str, a: str, b: str) -> None:
    """The longest beginning that is the same, of texts and of lists; an empty one has none."""
    left, right = both + a, both + b
    expected = max(n for n in range(min(len(left), len(right)) + 1) if left[:n] == right[:n])
    assert common_prefix(left, right) == common_prefix(list(left), list(right)) == expected
    assert common_prefix(left, "") == 0
