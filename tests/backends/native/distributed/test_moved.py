"""A checkpoint of any number of processes continues on any other, with other sharding, as if nothing had been interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import moved_ranks
from many_ranks.failing_cases import make
from many_ranks.moved_ranks import trained
from many_ranks.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
SOAK = pytest.mark.soak
FIRST, REST = (0, 2), (2, 4)


def run(folder: Path, ranks: int, **options: Any) -> dict[str, torch.Tensor]:
    """Train in ``ranks`` processes, or here where it is one."""
    if ranks == 1:
        return trained(folder, **options, mesh=None)
    options.setdefault("reshard", False)
    run_ranks(Path(moved_ranks.__file__), str(folder), json.dumps(options), ranks=ranks)
    weights: dict[str, torch.Tensor] = torch.load(folder / f"{options['save']}.pt")
    return weights


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint of one process, and one of two, each after two steps."""
    made = tmp_path_factory.mktemp("moved")
    run(made, 1, load=None, steps=FIRST, save="of-1")
    run(made, 2, load=None, steps=FIRST, save="of-2")
    return made


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run(tmp_path_factory.mktemp("whole"), 1, load=None, steps=(0, 4), save="whole")


@pytest.mark.parametrize(
    ("saved", "ranks", "reshard"),
    [
        (2, 1, None),
        (2, 4, True),
        pytest.param(1, 2, True, marks=pytest.mark.soak),
        pytest.param(1, 4, False, marks=pytest.mark.soak),
    ],
)
def test_a_checkpoint_moves(
    saved: int, ranks: int, reshard: bool | None, folder: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Two steps after it, the weights are those of four steps in one process; moments and the step's number count."""
    options = {} if reshard is None else {"reshard": reshard}
    found = run(folder, ranks, load=f"of-{saved}", steps=REST, save=f"{saved}-on-{ranks}", **options)
    assert apart(found, uninterrupted) <= 1e-12


def test_moments_count(folder: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    """The control: without the optimizer's moments the next steps are others."""
    backend = make(folder, mesh=None)
    backend.load_state(folder / "of-2").result()
    backend.save_state("weights-alone").result()
    found = run(folder, 1, load="weights-alone", steps=REST, save="without-moments")
    assert apart(found, uninterrupted) > 1e-4
