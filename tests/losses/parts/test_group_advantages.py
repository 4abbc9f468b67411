"""Group advantages against plain loops: every baseline and scale, groups without signal, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pullback.errors import ConfigError, DatumError, LengthError
from pullback.losses import group_advantages

MEMBERS = st.lists(st.tuples(st.floats(-5, 5) | st.sampled_from([0.0, 0.1]), st.integers(0, 2)), min_size=1, max_size=8)
MIXED = [(1.0, 7), (0.0, 7), (0.25, 7), (-3.0, 2), (4.0, 2), (0.1, 5), (0.1, 5), (0.1, 5), (9.0, 1), (2.0, 7)]


def plain(members: Sequence[tuple[float, int]], baseline: str, scale: str, eps: float) -> list[float]:
    """The definition, member by member."""
    advantages = []
    for i, (reward, group) in enumerate(members):
        others = [r for j, (r, g) in enumerate(members) if g == group and j != i]
        everyone = [*others, reward]
        if len(set(everyone)) == 1:
            advantages.append(0.0)
            continue
        mean = math.fsum(everyone) / len(everyone)
        compared = math.fsum(others) / len(others) if baseline == "leave_one_out" else mean
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in everyone) / (len(everyone) - 1))
        advantages.append((reward - compared) / (spread + eps if scale == "std" else 1.0))
    return advantages


@pytest.mark.parametrize(("baseline", "scale"), [*itertools.product(["mean", "leave_one_out"], ["std", "none"])])
@given(members=MEMBERS, eps=st.sampled_from([1e-6, 0.5]))
@example(members=MIXED, eps=0.5)
@example(members=[(1e15, 0), (-1e15, 0), (3.0, 1), (4.0, 2)], eps=0.0)
def test_advantages_are_plain_loops(baseline: Any, scale: Any, members: list[tuple[float, int]], eps: float) -> None:
    """Each reward against those of its group; groups that say nothing give exactly 0, and are counted apart."""
    rewards, ids = (torch.tensor(column) for column in zip(*members, strict=True))
    found = group_advantages(rewards.double(), ids, baseline=baseline, scale=scale, eps=eps)
    want = plain([(r, i) for r, i in zip(rewards.double().tolist(), ids.tolist(), strict=True)], baseline, scale, eps)
    assert found.advantages.tolist() == pytest.approx(want, rel=1e-8, abs=1e-8)
    assert [a == 0.0 for a, w in zip(found.advantages.tolist(), want, strict=True) if w == 0.0].count(False) == 0
    groups = [[r for r, i in zip(rewards.tolist(), ids.tolist(), strict=True) if i == g] for g in set(ids.tolist())]
    assert found.singletons == sum(len(group) == 1 for group in groups)
    assert found.equal == sum(len(group) > 1 and len(set(group)) == 1 for group in groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_wide(dtype: torch.dtype) -> None:
    """fp64 stays, anything else is fp32."""
    found = group_advantages(torch.tensor([1.0, 0.0], dtype=dtype), torch.tensor([0, 0]), scale="none")
    assert found.advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_what_is_refused() -> None:
    """Another shape on either side, rewards that are not finite, which are named, and unknown words."""
    two, ids = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    for rewards, groups in [
        (two[:, None], ids[:, None]),
        (two[0], ids[0]),
        (two, ids[:1]),
        (two[:1], ids),
        (two, ids[:, None]),
    ]:
        with pytest.raises(LengthError, match=r"must both be \[B\]"):
            group_advantages(rewards, groups)
    with pytest.raises(DatumError, match=r"sequences \[1, 3\] are not"):
        group_advantages(torch.tensor([0.0, math.nan, 1.0, math.inf]), torch.zeros(4, dtype=torch.int64))
    wrong: list[dict[str, Any]] = [{"baseline": "median"}, {"scale": "max"}, {"eps": -1e-9}]
    for options in wrong:
        with pytest.raises(ConfigError):
            group_advantages(two, ids, **options)
