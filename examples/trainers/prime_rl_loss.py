"""A loss for prime-rl, by its documented signature: one sequence in, a *sum* out.

    [trainer.loss]
    type = "custom"
    import_path = "prime_rl_loss.grpo"

prime-rl adds up the sequences and divides by the tokens of the global batch; a mean here would be divided twice.
"""

from __future__ import annotations

from typing import Any

from pullback.losses import GRPO, ClipRange, TokenBatch

try:
    from prime_rl.trainer.rl.loss import LossOutputs
except ImportError:  # not on a package index: the same two fields
    from types import SimpleNamespace as LossOutputs


def grpo(inputs: Any, clip_low: float = 0.2, clip_high: float = 0.28) -> Any:
    """Return the clipped surrogate of a sequence, summed over its tokens; ``inputs`` is a ``LossInputs``."""
    weights = inputs.loss_mask.float() if inputs.loss_weights is None else inputs.loss_weights * inputs.loss_mask
    batch = TokenBatch.from_padded(
        inputs.trainer_logprobs[None],
        weights[None],
        advantages=inputs.advantages[None],
        rollout_logprobs=inputs.inference_logprobs[None],
    )
    output = GRPO(ClipRange.from_epsilon(clip_low, clip_high), aggregation="sum").evaluate(batch)
    return LossOutputs(loss=output.loss, metrics={})
