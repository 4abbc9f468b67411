"""Ray Train starts the processes, and `TorchBackend` shards the model over them: the script is that of ``torchrun``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from toy_rows import rows, toy_model

from pullback.backends import AdamParams, HFModel, TorchBackend
from pullback.datums import from_rows


def worker(config: Mapping[str, Any]) -> None:
    """Every worker is given the whole batch, and gets the same results; one of them writes what is asked for."""
    data, _ = from_rows(rows(), None)
    backend = TorchBackend(HFModel(toy_model()), mesh="auto", timeout=120, checkpoint_dir=config["folder"])
    for _ in range(config["steps"]):
        backend.forward_backward(data, "cross_entropy")
        backend.optim_step(AdamParams(learning_rate=1e-2), "num_loss_tokens").result()
    backend.save_state("last").result()
    result = backend.forward(data, "cross_entropy").result()
    if ray.train.get_context().get_world_rank() == 0:
        torch.save([x["logprobs"].to_torch() for x in result.loss_fn_outputs], Path(config["folder"]) / "logprobs.pt")


def run(folder: str, steps: int, workers: int = 2) -> None:
    """Train on several workers. With GPUs: ``ScalingConfig(use_gpu=True)`` and ``TorchConfig("nccl")``."""
    scaling = ray.train.ScalingConfig(num_workers=workers)
    config = {"folder": folder, "steps": steps}
    TorchTrainer(worker, train_loop_config=config, scaling_config=scaling, torch_config=TorchConfig("gloo")).fit()
