"""A policy trained in one process, and on two ranks that average their gradients; as a script, one such rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pullback.losses import DPO, GRPO, KL, ORPO, PPO, CrossEntropy, Loss, TokenBatch

__all__ = ["LOSSES", "trained_alone"]

LOSSES: dict[str, Loss] = {
    "token mean": CrossEntropy("token_mean"),
    "sequence means": CrossEntropy("sequence_mean_token_mean"),
    "ppo": PPO(aggregation="token_mean"),
    "grpo": GRPO(kl=KL("k3")),
    "dpo": DPO(),
    "orpo": ORPO(nll="token_mean"),
}
SEQUENCES, TOKENS, WIDTH, STEPS = 16, 7, 5, 3
# The micro-batches of both ranks: neither sequences nor tokens are the same number everywhere.
SHARES = ((range(6), range(6, 10)), (range(10, 12), range(12, 16)))


class Policy(nn.Module):
    """Log-probs of at most 0 from features of tokens; the same at every start."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 4, dtype=torch.float64)
        self.outer = nn.Linear(4, 1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        logprobs: Tensor = nn.functional.logsigmoid(self.outer(torch.tanh(self.inner(features)))).squeeze(-1)
        return logprobs


def batch_of(loss: Loss, step: int, rows: Sequence[int], policy: Callable[[Tensor], Tensor]) -> TokenBatch:
    """Return some sequences of a step, scored by the policy."""
    generator = torch.Generator().manual_seed(step)

    def numbers(*size: int) -> Tensor:
        return torch.randn(SEQUENCES, TOKENS, *size, generator=generator, dtype=torch.float64)

    features, trained = numbers(WIDTH), torch.randint(1, TOKENS + 1, (SEQUENCES, 1), generator=generator)
    base = Policy()(features).detach()
    inputs = {
        "weights": torch.arange(TOKENS) < trained,
        "advantages": numbers(),
        "rollout_logprobs": base + 0.2 * numbers(),
        "ref_logprobs": base + 0.2 * numbers(),
    }
    keys = ("weights", *loss.required_inputs)
    fields = {"rollout_logprobs" if key == "logprobs" else key for key in keys}
    given = {name: each[list(rows)] for name, each in inputs.items() if name in fields}
    return TokenBatch.from_padded(policy(features[list(rows)]), given.pop("weights"), **given)


def trained(policy: nn.Module, gradient: Callable[[int], None]) -> Tensor:
    """Return the parameters after some steps, of which ``gradient`` computes each one's gradient."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, eps=1e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        gradient(step)
        optimizer.step()
    return nn.utils.parameters_to_vector(policy.parameters()).detach()


def trained_alone(loss: Loss) -> Tensor:
    """Return the parameters that one process comes to, with whole batches."""
    policy = Policy()

    def gradient(step: int) -> None:
        torch.autograd.backward(loss.evaluate(batch_of(loss, step, range(SEQUENCES), policy)).loss)

    return trained(policy, gradient)


def trained_on_rank(loss: Loss, rank: int, *, shared: bool) -> Tensor:
    """Return the parameters that two ranks come to, of two micro-batches each, over whose gradients they average.

    Args:
        loss: what is minimised.
        rank: of this process.
        shared: divide by the counts of all ranks; else by those of this rank alone, as a careless trainer does.
    """
    policy = Policy()
    averaging = DistributedDataParallel(policy)
    micro_batches = SHARES[rank]

    def gradient(step: int) -> None:
        own = loss.counts([batch_of(loss, step, rows, policy) for rows in micro_batches])
        totals = torch.tensor(list(own.values()), dtype=torch.float64)
        if shared:
            dist.all_reduce(totals)
        times = len(micro_batches) * (len(SHARES) if shared else 1)
        counted = loss.with_counts(averaged_over=times, **dict(zip(own, totals.tolist(), strict=True)))
        for i, rows in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            with nullcontext() if last else averaging.no_sync():
                share = counted.evaluate(batch_of(loss, step, rows, averaging))
                torch.autograd.backward(share / len(micro_batches))  # as trainers do that accumulate

    return trained(policy, gradient)


def main(folder: str) -> None:
    """Train every loss in both ways, and save the parameters of this rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {
        name: {shared: trained_on_rank(loss, rank, shared=shared) for shared in (True, False)}
        for name, loss in LOSSES.items()
    }
    torch.save(found, Path(folder, str(rank)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
