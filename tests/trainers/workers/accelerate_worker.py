"""One process of `test_accelerate`: a step of the example, or of the loop that everybody writes first."""

from __future__ import annotations

import sys
from pathlib import Path

import accelerate_loop
import torch
from accelerate import Accelerator
from other_trainers.trainer_checks import Recording
from toy_rows import micro_batches, rows, toy_model

from pullback.losses import TokenBatch
from pullback.ops import logprobs_of


def main(folder: str, steps: int, naive: bool) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = toy_model()
    optimizer = Recording(model.parameters())
    wrapped, prepared = accelerator.prepare(model, optimizer)
    own = rows()[accelerator.process_index :: accelerator.num_processes]
    batches = micro_batches(own, len(own) // steps)
    loss = 0.0
    if not naive:
        loss = accelerate_loop.train_step(accelerator, wrapped, prepared, batches)
    for batch in batches if naive else ():
        with accelerator.accumulate(wrapped):
            inputs = TokenBatch.from_labels(logprobs_of(wrapped, **batch), batch["labels"])
            accelerator.backward(accelerate_loop.LOSS.evaluate(inputs).loss)
            prepared.step()
            prepared.zero_grad()
    assert len(optimizer.gradients) == 1
    result = {"gradient": optimizer.gradients[0], "loss": loss, "processes": accelerator.num_processes}
    torch.save(result, Path(folder) / f"{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "naive")
