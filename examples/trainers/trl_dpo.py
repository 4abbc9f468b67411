"""The loss of TRL's DPOTrainer, computed by pullback: pairs are stacked, and the reference is a sum for each sequence."""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer

from pullback.losses import DPO, TokenBatch
from pullback.ops import logprobs_of

STORED = ("ref_chosen_logps", "ref_rejected_logps")  # in the batch, with precompute_ref_log_probs
# what would make it another loss, and is as here
PLAIN = {"loss_type": ["sigmoid"], "loss_weights": None, "f_divergence_type": "reverse_kl", "ld_alpha": None}


class PullbackDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl is not typed here
    """Divides by the pairs of the whole step, where TRL's own averages the means of its micro-batches."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, value in {**PLAIN, "use_weighting": False}.items():
            if getattr(self.args, name) != value:
                raise NotImplementedError(f"{name}={getattr(self.args, name)!r} is not carried over by this example")
        if self.aux_loss_enabled:
            raise NotImplementedError(
                "the loss of a mixture's routers is not carried over: set router_aux_loss_coef=0.0"
            )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Count pairs, over micro-batches and ranks, where the Trainer counts tokens."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["input_ids"]) // 2 for batch in batches), device=device)
        return batches, self.accelerator.reduce(pairs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, batch = DPO(self.beta, self.label_smoothing), self.token_batch(model, inputs)
        if not model.training:
            return (loss.evaluate(batch).loss, {}) if return_outputs else loss.evaluate(batch).loss
        ranks = self.accelerator.num_processes  # which average their gradients
        return loss.with_counts(pairs=num_items_in_batch, averaged_over=ranks).evaluate(batch)

    def token_batch(self, model: Any, inputs: Any) -> TokenBatch:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        others = {k: v for k, v in inputs.items() if k not in ("input_ids", "completion_mask", *STORED)}  # images, too
        logprobs = logprobs_of(model, inputs["input_ids"], labels, **others)
        if all(name in inputs for name in STORED):
            reference = [inputs[name] for name in STORED]
        else:
            reference = self.compute_ref_log_probs(
                self.ref_model or model, inputs
            )  # with its adapter off, if it has one
        return TokenBatch.from_labels(logprobs, labels, pairs="stacked", ref_logprob_sums=torch.cat(list(reference)))
