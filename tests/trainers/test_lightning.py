"""Lightning and Fabric: the gradient of the plain formula, at 1 and 4 micro-batches, on one and two processes; the trap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks.ranks import run_ranks
from other_trainers.trainer_checks import TOLERANCE, Recording, error, gradient, token_mean
from torch import Tensor
from torch.utils.data import DataLoader
from toy_rows import micro_batches, rows, toy_model

lightning = pytest.importorskip("lightning", reason="needs Lightning: make trainers TRAINERS=lightning")
import lightning_module  # noqa: E402

from pullback.losses import TokenBatch  # noqa: E402
from pullback.ops import logprobs_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning
WORKER = Path(__file__).parent / "workers" / "fabric_worker.py"
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def exact() -> Tensor:
    model = toy_model()
    return gradient(model, token_mean(model, rows()))


def fitted(module: Any, data: Any, **options: Any) -> Tensor:
    """The gradient that the optimizer of a module is given in one step."""
    kept: list[Recording] = []

    def recording(parameters: Any, lr: float) -> Recording:
        kept.append(Recording(parameters))
        return kept[0]

    lightning.Trainer(**OPTIONS, **options).fit(module(toy_model(), recording), DataLoader(data, batch_size=None))
    assert len(kept[0].gradients) == 1
    return kept[0].gradients[0]


@pytest.mark.parametrize("steps", [1, 4])
def test_trainer(steps: int) -> None:
    """A batch is a step; its micro-batches add up to the plain formula."""
    found = fitted(lightning_module.Module, [micro_batches(rows(), 8 // steps)])
    assert error(found, exact()) < TOLERANCE[torch.float32]


class Automatic(lightning_module.Module):
    """The module that everybody writes first: each micro-batch is a batch, and Lightning averages."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.automatic_optimization = True

    def training_step(self, batch: Any, index: int) -> Any:
        logprobs = logprobs_of(self.model, **batch)
        return lightning_module.LOSS.evaluate(TokenBatch.from_labels(logprobs, batch["labels"])).loss


def test_a_mean_of_means_is_another_gradient() -> None:
    """The control."""
    assert error(fitted(Automatic, micro_batches(rows(), 2), accumulate_grad_batches=4), exact()) > 0.3


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_fabric(steps: int, ranks: int, tmp_path: Path) -> None:
    """On two processes both step on the gradient over all tokens."""
    run_ranks(WORKER, str(tmp_path), str(steps), ranks=ranks)
    for rank in range(ranks):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["processes"] == ranks
        assert error(found["gradient"], exact()) < TOLERANCE[torch.float32]
