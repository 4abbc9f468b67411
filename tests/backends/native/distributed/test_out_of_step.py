"""What one rank does alone keeps no other waiting, and is part of no gradient: both are told, and what comes next is exact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import out_of_step
from many_ranks.out_of_step import DEALS, FILES
from many_ranks.ranks import found_by_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
pytest.importorskip("transformers", reason="one model is of transformers (extra hf)")
EXACT = 1e-12
Found = dict[str, Any]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return found_by_ranks(Path(out_of_step.__file__), tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("name", DEALS)
def test_a_share_that_cannot_be_laid_out(name: str, reshard: bool, two: list[Found]) -> None:
    """One rank would have freed its weights, and would wait for the other in the next call to gather them."""
    for rank, found in enumerate(two):
        told = found["dealt"][f"{name}, {reshard}"]
        assert told["type"] == ("OSError" if rank else "RankFailedError"), told
        assert told["next"] <= EXACT


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_one_rank_cannot_load(name: str, two: list[Found]) -> None:
    """It is refused by all before anything changes, or the others, which have loaded, go on only after another load."""
    for rank, found in enumerate(two):
        told, half = found["loaded"][name], name == "applying"
        assert told["type"] == ("OSError" if rank else "RankFailedError"), told
        words = "other ranks have changed their weights already" if half else "nothing has changed on any rank"
        assert rank or re.search(words, told["words"]), told
        assert told["again"]["type"] == ("BackendError" if half else "NoneType"), told
        assert told["next"] <= EXACT


def test_a_loss_of_a_retained_forward_that_goes_on_after_a_failure(two: list[Found]) -> None:
    """The forward that failed has freed the weights."""
    for found in two:
        assert max(found["caught"]) <= EXACT


def test_frozen_weights_that_are_not_sharded_stay_in_their_dtype(two: list[Found]) -> None:
    """In fp32 they could not be multiplied with what the sharded ones compute in bfloat16."""
    for found in two:
        for gradient, logprob in found["frozen"]:
            assert gradient < 1e-2
            assert logprob == 0.0


def test_a_registered_loss_that_differs_by_rank(two: list[Found]) -> None:
    """Each rank evaluates its own share, so that the gradient would be of neither loss."""
    for found in two:
        for told in found["loss"]:
            assert told["type"] in ("RanksDifferError", "RankFailedError"), told
            assert "of_this_rank has another gradient on the rank that scores the datum" in told["words"], told
