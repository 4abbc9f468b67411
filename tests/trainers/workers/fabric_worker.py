"""One process of `test_lightning`: a step with Fabric, data-parallel where there are two."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning_module import fabric_step
from other_trainers.trainer_checks import Recording
from toy_rows import micro_batches, rows, toy_model


def main(folder: str, steps: int) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    several = (
        {"strategy": "ddp", "plugins": [TorchElasticEnvironment()], "devices": ranks} if ranks > 1 else {"devices": 1}
    )
    fabric = Fabric(accelerator="cpu", **several)
    fabric.launch()
    model = toy_model()
    optimizer = Recording(model.parameters())
    wrapped, prepared = fabric.setup(model, optimizer)
    own = rows()[fabric.global_rank :: ranks]
    fabric_step(fabric, wrapped, prepared, micro_batches(own, len(own) // steps))
    result = {"gradient": optimizer.gradients[0], "processes": fabric.world_size}
    torch.save(result, Path(folder) / f"{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
