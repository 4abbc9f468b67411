"""The totals of a step on real ranks: two processes that average their gradients make the update of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from many_ranks import data_parallel
from many_ranks.data_parallel import LOSSES, trained_alone
from many_ranks.ranks import run_ranks
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
Found = dict[str, dict[bool, Tensor]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two processes was trained to."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(Path(data_parallel.__file__), str(folder))
    return [torch.load(folder / str(rank)) for rank in range(2)]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_are_one_process(name: str, ranks: list[Found]) -> None:
    """With the totals of all ranks, and what the trainer averages over, the parameters agree to 1e-12 after three steps."""
    expected = trained_alone(LOSSES[name])
    for found in ranks:
        assert distance(found[name][True], expected) <= 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_counts_of_one_rank_are_noticed(name: str, ranks: list[Found]) -> None:
    """Negative control: where every rank divides by its own counts, the update is another one, on both ranks the same."""
    first, second = (found[name][False] for found in ranks)
    assert torch.equal(first, second)
    assert distance(first, trained_alone(LOSSES[name])) > 1e-4
