"""Ray Train: two workers with a data-parallel model, and the gradient of one step over the tokens of both.

Ray prepares the model (``DistributedDataParallel``) and counts nothing: the tokens are added up over the workers here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from toy_rows import micro_batches, rows, toy_model

from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import logprobs_of

LOSS = CrossEntropy("token_mean")


def train_step(model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[Mapping[str, Any]]) -> None:
    """Make one step on the micro-batches that this worker has, each divided by the tokens of all on all workers."""
    tokens = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
    torch.distributed.all_reduce(tokens)
    share = LOSS.with_counts(tokens=tokens, averaged_over=torch.distributed.get_world_size())
    optimizer.zero_grad()
    for i, batch in enumerate(batches):
        model.require_backward_grad_sync = i + 1 == len(batches)  # what no_sync() sets
        torch.autograd.backward(share.evaluate(TokenBatch.from_labels(logprobs_of(model, **batch), batch["labels"])))
    optimizer.step()


def worker(config: Mapping[str, Any]) -> None:
    rank, ranks = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    plain = toy_model()
    model, optimizer = prepare_model(plain), config["optimizer"](plain.parameters(), lr=config["lr"])
    own = rows()[rank::ranks]
    train_step(model, optimizer, micro_batches(own, len(own) // config["accumulation"]))
    if rank == 0:
        torch.save([p.grad for p in plain.parameters()], config["file"])


def run(file: str, accumulation: int) -> None:
    config = {"file": file, "accumulation": accumulation, "optimizer": torch.optim.SGD, "lr": 0.0}
    scaling = ray.train.ScalingConfig(num_workers=2)
    TorchTrainer(worker, train_loop_config=config, scaling_config=scaling, torch_config=TorchConfig("gloo")).fit()
