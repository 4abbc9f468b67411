"""The Trainer of transformers, with a loss that divides by the tokens of the whole step.

The Trainer counts them over micro-batches and ranks (``num_items_in_batch``), and divides by nothing else.
"""

from __future__ import annotations

import tempfile
from typing import Any

from torch import Tensor
from toy_rows import collate, rows, toy_model
from transformers import Trainer, TrainingArguments

from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import logprobs_from_logits, logprobs_of

LOSS = CrossEntropy("token_mean")


def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """For ``Trainer(compute_loss_func=compute_loss)``."""
    logprobs = logprobs_from_logits(outputs.logits, labels)
    return LOSS.with_counts(tokens=num_items_in_batch).evaluate(TokenBatch.from_labels(logprobs, labels))


class ChunkedTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed here
    """The same without the logits of all tokens."""

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logprobs = logprobs_of(model, labels=labels, **inputs)
        counted = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1  # ranks of the count
        share = LOSS.with_counts(tokens=num_items_in_batch, averaged_over=counted)
        loss = share.evaluate(TokenBatch.from_labels(logprobs, labels))
        return (loss, {"loss": loss}) if return_outputs else loss


def main() -> None:
    """Train by both, from the same start: they arrive at the same loss."""
    for chunked in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 8}
            arguments = TrainingArguments(folder, **sizes, learning_rate=1e-2, report_to=[], use_cpu=True)
            way = {"model": toy_model(), "args": arguments, "train_dataset": rows(), "data_collator": collate}
            trainer = ChunkedTrainer(**way) if chunked else Trainer(**way, compute_loss_func=compute_loss)
            print("chunked" if chunked else "compute_loss_func", round(trainer.train().training_loss, 4))


if __name__ == "__main__":
    main()
