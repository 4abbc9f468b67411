"""A loss for torchtitan: ``(pred, labels, global_valid_tokens) -> (loss, metrics)``, set as the ``loss`` of a Trainer.Config.

torchtitan counts the valid tokens of the global batch before its first forward, and sums gradients over data parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.loss import BaseLoss

from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import logprobs_from_logits


class PullbackLoss(BaseLoss):  # type: ignore[misc]  # torchtitan is not typed here
    """Cross-entropy of pullback; its labels are shifted already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self.loss = CrossEntropy("token_mean")

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Any = None, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = logprobs_from_logits(pred, labels, shifted=True)
        # [B, T] in torchtitan 0.3, packed tokens [N] in later versions: one row
        batch = TokenBatch.from_labels(logprobs.view(-1, logprobs.shape[-1]), labels.view(-1, labels.shape[-1]))
        return self.loss.with_counts(tokens=global_valid_tokens).evaluate(batch), {}
