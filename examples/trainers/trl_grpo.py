"""The losses of TRL's GRPOTrainer, computed by pullback under their own names and divided as TRL divides them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from pullback.losses import Loss, TokenBatch, preset
from pullback.ops import logprobs_of


class PullbackGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # trl is not typed here
    """``loss_type`` is one that pullback has: grpo (of sequences: gspo), dapo, bnpo, dr_grpo, cispo, luspo."""

    def pullback_loss(self) -> Loss:
        sequence = self.importance_sampling_level == "sequence"
        name = "gspo" if self.loss_type == "grpo" and sequence else self.loss_type
        entropies = self.top_entropy_quantile < 1 or self._entropy_bonus_enabled
        if self.use_vllm or entropies or self.args.delta or self.aux_loss_enabled:
            raise NotImplementedError("vLLM's correction, entropies, delta, routers' losses: not carried over here")
        other_level, no_kl = sequence != (name in ("gspo", "luspo")), name in ("gspo", "luspo", "cispo")
        if other_level or (self.beta and no_kl) or self.off_policy_mask_threshold is not None:
            raise NotImplementedError(f"{name}: its level of ratios, its KL or its mask is not that of this example")
        options: dict[str, Any] = {} if name == "cispo" else {"epsilon": self.epsilon_low}
        options["epsilon_high"] = self.epsilon_high
        if name in ("grpo", "dapo", "bnpo", "dr_grpo"):
            options |= {"beta": self.beta, "use_bias_correction_kl": self.args.use_bias_correction_kl}
        if name == "dr_grpo":
            options["max_completion_length"] = self.max_completion_length
        return preset(f"trl:{name}", **options)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        batch = self.token_batch(model, inputs)
        loss, steps = self.pullback_loss(), self.current_gradient_accumulation_steps if self.model.training else 1
        denominator = loss.main_aggregation.denominator
        if self.loss_type in ("dapo", "cispo"):  # counted over the ranks, for a generation that serves several steps
            total = inputs["num_items_in_batch"].clamp(min=1) * steps
            total = total / self.args.steps_per_generation if self.model.training else total
            share = loss.with_counts(tokens=total, averaged_over=self.accelerator.num_processes)
        else:  # means of micro-batches, which TRL averages: right where all have as many of what is counted
            share = loss.with_counts(**{denominator: max(1.0, loss.counts([batch])[denominator]) * steps})
        return share.evaluate(batch)

    def token_batch(self, model: Any, inputs: Any) -> TokenBatch:
        if any(inputs.get(x) is not None for x in ("pixel_values", "token_type_ids", "mm_token_type_ids")):
            raise NotImplementedError("images and types of tokens are not carried over by this example")
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        labels = torch.cat([torch.full_like(prompt, -100), completion.masked_fill(mask == 0, -100)], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        ids = torch.cat([prompt, completion], dim=1)
        logprobs = logprobs_of(model, ids, labels, attention_mask=attention, temperature=self.temperature)
        logprobs = logprobs[:, -completion.shape[1] :]
        old, reference = inputs.get("old_per_token_logps"), inputs["ref_per_token_logps"] if self.beta else None
        anchors = {"rollout_logprobs": logprobs.detach() if old is None else old, "ref_logprobs": reference}
        return TokenBatch.from_padded(logprobs, mask.bool(), advantages=inputs["advantages"], **anchors)
