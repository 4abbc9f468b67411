"""Accelerate: the gradient of a step is the same for any number of processes and micro-batches.

``accelerator.backward`` divides by the accumulation steps, and processes average their gradients: ``averaged_over``
undoes both. Run it by ``accelerate launch --cpu --num_processes 2 accelerate_loop.py``, or alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from toy_rows import micro_batches, rows, toy_model

from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import logprobs_of

LOSS = CrossEntropy("token_mean")


def train_step(accelerator: Accelerator, model: Any, optimizer: Any, batches: Sequence[Mapping[str, Any]]) -> float:
    """Make one step on the micro-batches that this process has, each divided by the tokens of all on all processes."""
    own = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches), device=accelerator.device)
    averaged_over = accelerator.num_processes * accelerator.gradient_accumulation_steps
    share = LOSS.with_counts(tokens=accelerator.reduce(own), averaged_over=averaged_over)
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            loss = share.evaluate(TokenBatch.from_labels(logprobs_of(model, **batch), batch["labels"]))
            accelerator.backward(loss)
            optimizer.step()  # takes effect at the last micro-batch
            optimizer.zero_grad()
            total += loss.detach() / averaged_over
    return float(accelerator.reduce(total))


def main() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    model = toy_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    own = micro_batches(rows()[rank::ranks], size=4 // ranks)
    for step in range(4):
        loss = train_step(accelerator, model, optimizer, own)
        accelerator.print(step, round(loss, 4))
    accelerator.end_training()


if __name__ == "__main__":
    main()
