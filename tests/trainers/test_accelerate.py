"""Accelerate on two processes: the gradient of the plain formula, at 1 and 4 accumulation steps; and the trap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks.ranks import run_ranks
from other_trainers.trainer_checks import TOLERANCE, error, gradient, token_mean
from toy_rows import rows, toy_model

pytest.importorskip("accelerate", reason="needs Accelerate: make trainers TRAINERS=accelerate")
pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "workers" / "accelerate_worker.py"


def step(folder: Path, steps: int, way: str) -> list[dict[str, Any]]:
    """What both processes found."""
    run_ranks(WORKER, str(folder), str(steps), way)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("steps", [1, 4])
def test_two_processes(steps: int, tmp_path: Path) -> None:
    """Both processes step on the same gradient, and it is the plain formula's over all tokens."""
    model = toy_model()
    loss = token_mean(model, rows())
    exact = gradient(model, loss)
    for found in step(tmp_path, steps, "ours"):
        assert found["processes"] == 2
        assert error(found["gradient"], exact) < TOLERANCE[torch.float32]
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_own_counts_are_another_gradient(tmp_path: Path) -> None:
    """The control: Accelerate averages the means, so that tokens weigh unequally."""
    model = toy_model()
    (found, _) = step(tmp_path, 4, "naive")
    assert error(found["gradient"], gradient(model, token_mean(model, rows()))) > 0.3
