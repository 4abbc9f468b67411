"""Two and four processes are one: gradients, norms, moments and weights after three clipped steps, to 1e-10 in fp64.

Weights after one Adam step would hide a gradient of half the size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import many_exact
from many_ranks.ranks import found_by_ranks

Found = dict[str, dict[str, float]]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"
)
pytest.importorskip("transformers", reason="the models are those of transformers (extra hf)")
pytest.importorskip("peft", reason="adapters are those of peft (extra hf)")


def named(case: tuple[Any, ...]) -> str:
    return many_exact.name_of(*case)


def trained(folder: Path, ranks: int, whole: bool) -> list[Found]:
    return found_by_ranks(Path(many_exact.__file__), folder, "whole" if whole else "part", ranks=ranks, seconds=900)


def require_one_process(found: list[Found], case: str) -> None:
    for rank, each in enumerate(found):
        worst = max(each[case], key=lambda name: each[case][name])
        assert each[case][worst] <= 1e-10, f"rank {rank}: {worst} is {each[case][worst]} off"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return trained(tmp_path_factory.mktemp("two"), 2, whole=False)


@pytest.fixture(scope="module")
def two_whole(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return trained(tmp_path_factory.mktemp("two"), 2, whole=True)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return trained(tmp_path_factory.mktemp("four"), 4, whole=True)


@pytest.mark.parametrize("case", [*map(named, many_exact.cases(False))])
def test_two_ranks(case: str, two: list[Found]) -> None:
    require_one_process(two, case)


@pytest.mark.parametrize("case", [f"shared-{loss}-{reshard}" for loss, reshard in many_exact.SHARED])
def test_adapters_on_a_base_that_is_not_spread(case: str, two: list[Found]) -> None:
    """Two adapters in turn are those of one process, and share the frozen weights of their base."""
    require_one_process(two, case)
    assert all(each[case]["copied"] == 0 for each in two)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*map(named, many_exact.cases(True))])
def test_every_case_on_two_ranks(case: str, two_whole: list[Found]) -> None:
    require_one_process(two_whole, case)


@pytest.mark.soak
@pytest.mark.parametrize(
    "case", [*(many_exact.name_of(*case) for case in many_exact.cases(True)), "full-hybrid", "lora-hybrid"]
)
def test_every_case_on_four_ranks(case: str, four: list[Found]) -> None:
    require_one_process(four, case)
