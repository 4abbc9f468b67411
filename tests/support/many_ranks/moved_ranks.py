"""One rank of a job that trains from a checkpoint, or from the start, and leaves a checkpoint and its weights."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from many_ranks.failing_cases import DATA, NEXT, PARAMS, make

from pullback.backends import TorchBackend


def whole(backend: TorchBackend) -> dict[str, torch.Tensor]:
    """Return the trained weights, gathered."""
    named = {name: p.detach() for name, p in backend.model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in named.items()}


def trained(folder: Path, load: str | None, steps: tuple[int, int], save: str, **options: Any) -> dict[str, Any]:
    """Make some steps of a run, from a checkpoint where one is named; return the weights."""
    backend = make(folder, **options)
    if load is not None:
        backend.load_state_with_optimizer(folder / load).result()
    for step in range(*steps):
        backend.forward_backward(DATA if step % 2 else NEXT, "ppo").result()
        backend.optim_step(PARAMS).result()
    backend.save_state(save).result()
    return whole(backend)


def main(folder: str, given: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    options = json.loads(given)
    weights = trained(Path(folder), **options)
    if dist.get_rank() == 0:
        torch.save(weights, Path(folder) / f"{options['save']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
