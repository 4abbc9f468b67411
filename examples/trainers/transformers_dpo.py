"""DPO in the Trainer of transformers: a subclass that counts the pairs of the whole step."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from toy_rows import collate, preferences, toy_model
from transformers import Trainer, TrainingArguments

from pullback.losses import DPO, TokenBatch
from pullback.ops import logprobs_of


class DPOTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed here
    """Rows have a ``chosen`` and a ``rejected`` side; a batch holds them as neighbours."""

    loss_is_scaled_for_ga = True  # by the pairs of the whole step

    def __init__(self, *args: Any, reference: Any, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=self.sides, **kwargs)
        self.reference, self.loss = reference.eval(), DPO(beta)

    @staticmethod
    def sides(pairs: list[Any]) -> Any:
        return collate([pair[side] for pair in pairs for side in ("chosen", "rejected")])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Count pairs, over micro-batches and ranks, where the Trainer counts tokens."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["labels"]) // 2 for batch in batches), device=device)
        return batches, self.accelerator.reduce(pairs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logprobs = logprobs_of(model, **inputs)
        with torch.no_grad():
            reference = logprobs_of(self.reference, **inputs)
        batch = TokenBatch.from_labels(logprobs, inputs["labels"], pairs="interleaved", ref_logprobs=reference)
        if not model.training:
            return (self.loss.evaluate(batch).loss, {}) if return_outputs else self.loss.evaluate(batch).loss
        ranks = self.accelerator.num_processes  # which average their gradients
        return self.loss.with_counts(pairs=num_items_in_batch, averaged_over=ranks).evaluate(batch)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 8}
        arguments = TrainingArguments(folder, **sizes, report_to=[], use_cpu=True, remove_unused_columns=False)
        trainer = DPOTrainer(toy_model(), arguments, train_dataset=preferences(), reference=toy_model())
        print("loss", round(trainer.train().training_loss, 4))


if __name__ == "__main__":
    main()
