"""What surrounds the calls of several processes changes nothing unseen: autocast, a backward of one's own, lost gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import surrounded
from many_ranks.ranks import found_by_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
pytest.importorskip("transformers", reason="the models are those of transformers (extra hf)")
EXACT = 1e-12
Found = dict[str, Any]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the page writes its checkpoint
        return found_by_ranks(Path(surrounded.__file__), folder)


@pytest.mark.parametrize("reshard", surrounded.RESHARD)
def test_autocast_around_several_calls(reshard: bool, two: list[Found]) -> None:
    """A remembered cast loses no gradient: that of a layer would be 0.5 off (one call of two) or 1.0."""
    for found in two:
        assert found["autocast"][surrounded.RESHARD.index(reshard)] < 0.05


@pytest.mark.parametrize("kind", surrounded.UNUSED)
def test_weights_without_a_gradient_stay(kind: str, two: list[Found]) -> None:
    """What no rank has reached has no gradient, no moments and no decay, as on one process."""
    for found in two:
        assert max(found["unused"][kind].values()) < 1e-8


@pytest.mark.parametrize("reshard", surrounded.RESHARD)
@pytest.mark.parametrize("case", surrounded.FOREIGN)
def test_a_backward_of_ones_own(case: str, reshard: bool, two: list[Found]) -> None:
    """It is noticed on every rank, before a call and before a step, and forgotten with the rest."""
    for rank, found in enumerate(two):
        told = found["foreign"][surrounded.RESHARD.index(reshard)].get(case)
        if told is None:
            continue  # with resharding, all ranks go backward together
        elsewhere = case.endswith("one") and rank == 0
        for work in ("call", "step", "function"):
            assert told[work].startswith("RankFailedError" if elsewhere else "BackendError"), told[work]
            assert "not accumulated here" in told[work] or "not the one that has accumulated here" in told[work]
        assert told["apart"] < EXACT


def test_a_retained_forward_of_few_datums(two: list[Found]) -> None:
    """A rank that has none of them takes part, and its forward has not served before."""
    for found in two:
        assert max(found["retained"]) < EXACT


def test_the_datum_whose_gradient_is_not_finite_is_named(two: list[Found]) -> None:
    """By each way to a gradient, and on every rank, as on one process: sums over all processes are not to blame."""
    for found in two:
        for many, alone in found["blamed"].values():
            assert "first caused by datum 2" in alone
            assert alone.removeprefix("NonFiniteError: ") in many


def test_gradients_that_one_rank_has_forgotten(two: list[Found]) -> None:
    """Its shards would have those of later calls alone."""
    for found in two:
        for told in found["forgotten"]:
            assert told.startswith("RanksDifferError")
            assert "after 0 calls" in told
            assert "after 1 call" in told


def test_the_page_runs_on_two_ranks(two: list[Found]) -> None:
    for found in two:
        assert found["page"] == "none"


def test_buffers_of_a_bfloat16_model(two: list[Found]) -> None:
    """What is no trained weight stays in its dtype: here, in the file, and on any number of processes that load it."""
    for found in two:
        told = found["buffers"]
        assert told["here"] == {"wide": "torch.float32 1.001000", "narrow": "torch.bfloat16 1.250000"}
        assert (told["one"], told["all"]) == ("none", "none")
        assert told["loaded on one"] == told["loaded on all"] == told["here"]
        assert told["bytes"] < 0.1
