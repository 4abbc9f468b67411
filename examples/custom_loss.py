"""A loss of your own, checked for what every sound loss has, and trained without a second forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback import AdamParams, Datum, TorchBackend
from pullback.datums import datum_from_prompt_completion
from pullback.testing import TinyLM, check_loss


def focal(data: Sequence[Datum], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy that cares less for tokens the model already knows: ``-(1 - p)^2 log p``, a raw sum."""
    total = torch.zeros(())
    for datum, logprobs in zip(data, logprobs_list, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_torch()
        safe = torch.where(weights != 0, logprobs, 0.0)  # select, never multiply: 0 * NaN is NaN
        total = total - (weights * (1 - safe.exp()).square() * safe).sum()
    return total, {"focal": total.item()}


check_loss(focal, examples=6)
backend = TorchBackend(TinyLM(dtype=torch.float32))
data = [datum_from_prompt_completion([1, 2], [3, 4, 5]), datum_from_prompt_completion([6], [7, 8])]
for step in range(15):
    result = backend.forward_backward_custom(data, focal).result()
    backend.optim_step(AdamParams(learning_rate=1e-2), "num_loss_tokens").result()
    if step % 5 == 0:
        print(step, round(result.metrics["focal"], 3))
