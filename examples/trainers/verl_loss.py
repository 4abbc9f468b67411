"""A policy loss for verl: ``actor.policy_loss.loss_mode=pullback_grpo``, divided by verl's counts of the global batch.

verl's own losses fall back to the count of the micro-batch where one process is not told the global one; this one asks for it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss

from pullback.losses import TokenBatch, preset

# the total that each aggregation divides by -> where verl keeps it
COUNTS = {"tokens": "batch_num_tokens", "sequences": "global_batch_size"}


@register_policy_loss("pullback_grpo")  # type: ignore[untyped-decorator]  # verl is not typed here
def grpo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """GRPO with verl's dual clip, from the actor's config."""
    if rollout_is_weights is not None:
        raise NotImplementedError(
            "give preset('verl:vanilla', rollout_is=...) the sampler's log-probs instead of weights"
        )
    loss = preset(
        "verl:vanilla",
        clip_ratio_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        clip_ratio_c=config.get("clip_ratio_c", 3.0),
        loss_agg_mode=loss_agg_mode,
        loss_scale_factor=config.loss_scale_factor,
    )
    batch = TokenBatch.from_padded(log_prob, response_mask.bool(), advantages=advantages, rollout_logprobs=old_log_prob)
    denominator, step = loss.main_aggregation.denominator, config.global_batch_info
    counts: dict[str, Any] = {} if denominator == "none" else {denominator: step.get(COUNTS[denominator])}
    output = loss.evaluate(batch, counts)
    metrics = {f"actor/{name}": output.metrics[name].value for name in ("ratio", "clip_fraction")}
    return output.loss * step["dp_size"], metrics  # the ranks average their gradients
