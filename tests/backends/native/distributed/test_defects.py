"""Each way in which training on several processes goes wrong is planted, and is then far from one process, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import many_defects
from many_ranks.ranks import found_by_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
pytest.importorskip("transformers", reason="the models are those of transformers (extra hf)")
pytest.importorskip("peft", reason="adapters are those of peft (extra hf)")
Found = dict[str, Any]


def planted(folder: Path, ranks: int) -> list[Found]:
    return found_by_ranks(Path(many_defects.__file__), folder, ranks=ranks, seconds=600)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return planted(tmp_path_factory.mktemp("two"), 2)


def largest(found: dict[str, float], kind: str = "gradient ") -> float:
    return max(value for name, value in found.items() if name.startswith(kind))


def test_divided_by_world_twice(two: list[Found]) -> None:
    """The gradient is half as large."""
    for found in two:
        gradients = {n: x for n, x in found["divided by world twice"].items() if n.startswith("gradient ")}
        assert all(x == pytest.approx(0.5, abs=1e-9) for x in gradients.values())


def test_local_counts(two: list[Found]) -> None:
    """Ranks that would divide by other counts do not step."""
    for found in two:
        assert found["local counts"].startswith(
            "RanksDifferError: optim_step: rank 1 was given another choice of settings"
        )


def test_local_clip(two: list[Found]) -> None:
    """The gradients of the first step are right; norms and moments are not."""
    for found in two:
        assert largest(found["local clip"]) < 1e-12
        assert found["local clip"]["norms"] > 1e-3
        assert largest(found["local clip"], "exp_avg:") > 1e-3


def test_rank_order(two: list[Found]) -> None:
    """A loss that knows the order of its datums gets another gradient."""
    for found in two:
        assert largest(found["rank order"]) > 1e-2


@pytest.mark.parametrize("name", many_defects.names())
def test_missing_reduction(name: str, two: list[Found]) -> None:
    """Whichever parameter's it is, its own gradient is wrong before the step, and no other's."""
    for found in two:
        distances = found[f"missing {name}"]
        assert distances.pop(f"gradient {name}") > 1e-2
        assert largest(distances) < 1e-12


def test_other_data(two: list[Found]) -> None:
    """It is an error that names the datum, on every rank, and nothing is added; unnoticed, the gradient would be another."""
    for found in two:
        assert "rank 1 was given another batch than rank 0: datum 0 differs (8 in all)" in found["other data"]["error"]
        assert found["other data"]["untouched"]
        assert max(found["other data, unnoticed"].values()) > 1e-2


def test_another_loss(two: list[Found]) -> None:
    for found in two:
        assert "RanksDifferError: forward_backward: rank 1 was given another loss" in found["another loss"]["error"]
        assert found["another loss"]["untouched"]


@pytest.mark.parametrize("rank", range(2))
def test_nan_in_a_shard(rank: int, two: list[Found]) -> None:
    """Wherever the NaN lies, every rank has the error, with the parameter's name, and nothing is added."""
    for found in two:
        assert "NonFiniteError: the gradient of model" in found[f"nan on rank {rank}"]["error"]
        assert found[f"nan on rank {rank}"]["untouched"]


def test_adapter_after_sharding(two: list[Found]) -> None:
    for found in two:
        assert found["adapter after sharding"].startswith("BackendError: the model is sharded already")


def test_without_all_reduce(tmp_path: Path) -> None:
    """Replicas that do not exchange their gradients have none, which is an error."""
    for found in planted(tmp_path, 4):
        assert found["without all-reduce"].startswith("BackendError: none of the 21 weights")
