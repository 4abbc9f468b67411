"""Sound losses in the styles of this field: as one's own, verl's, TRL's, transformers' and the cookbooks' code has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SOUND"]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), values, 0.0).sum() / mask.sum().clamp(min=1)


def clean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, 0.0)


def nll(logprobs: Tensor, weights: Tensor) -> Tensor:
    return -torch.where(weights != 0, logprobs * weights, 0.0).sum()


def mean_nll(lp: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-lp, mask)


def labelled_nll(logprobs: Tensor, labels: Tensor, num_items_in_batch: int) -> Tensor:
    return -logprobs.masked_fill(labels == -100, 0.0).sum() / max(num_items_in_batch, 1)


def reinforce(logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    per_token = clean(-advantages, loss_mask) * clean(logprobs, loss_mask)
    lengths = loss_mask.sum(-1)
    rows = per_token.sum(-1) / lengths.clamp(min=1)
    return rows.sum() / (lengths > 0).sum().clamp(min=1)


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The manner of verl: a dual clip, a bounded log-ratio, and three numbers beside the loss."""
    log_prob, old, advantages = (clean(x, response_mask) for x in (log_prob, old_log_prob, advantages))
    difference = torch.clamp(log_prob - old, min=-20.0, max=20.0)
    ratio = torch.exp(difference)
    clipped = torch.clamp(ratio, 1 - cliprange, 1 + (cliprange_high or cliprange))
    once = torch.maximum(-advantages * ratio, -advantages * clipped)
    losses = torch.where(advantages < 0, torch.min(-advantages * clip_ratio_c, once), once)
    fraction = masked_mean((once > -advantages * ratio).to(log_prob.dtype), response_mask)
    return (
        masked_mean(losses, response_mask),
        fraction.detach(),
        masked_mean(-difference, response_mask).detach(),
        fraction.detach(),
    )


def compute_loss(inputs: dict[str, Any]) -> Tensor:
    """The manner of TRL's GRPO: a dict of inputs, advantages of rows, a k3 penalty."""
    mask, logps = inputs["completion_mask"], inputs["per_token_logps"]
    logps = clean(logps, mask)
    old = inputs.get("old_per_token_logps")
    old = logps.detach() if old is None else clean(old, mask)
    difference = clean(inputs["ref_per_token_logps"], mask) - logps
    bounded = difference.clamp(max=20.0)
    kl = torch.exp(bounded) - 1 - difference + torch.exp(bounded) * (difference - bounded)
    ratio = torch.exp((logps - old).clamp(-20, 20))
    advantages = inputs["advantages"].unsqueeze(1)
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    return masked_mean(losses + 0.04 * kl, mask)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The manner of TRL's DPO: one loss per pair, and the rewards of both sides."""
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return -F.logsigmoid(beta * (chosen - rejected)), (beta * chosen).detach().mean(), (beta * rejected).detach().mean()


def for_causal_lm(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """The manner of transformers: shifts by itself, ignores -100, sums and divides by the count of the step."""
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    loss = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return (
        loss / (targets != -100).sum().clamp(min=1)
        if num_items_in_batch is None
        else loss / num_items_in_batch.clamp(min=1)
    )


def cispo(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """A detached, truncated ratio: the value's slope is not the gradient."""
    lp, rollout, adv = (clean(x, mask) for x in (logprobs, rollout_logprobs, advantages))
    with torch.no_grad():
        weight = torch.exp((lp - rollout).clamp(max=5.0)).clamp(max=5.0)
    return masked_mean(-weight * adv * lp, mask), {"capped": float((weight == 5.0).sum())}


def gspo(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The ratio of whole sequences, clipped within a very narrow range."""
    lp, old, adv = (clean(x, mask) for x in (log_probs, old_log_probs, advantages))
    lengths = mask.sum(-1).clamp(min=1)
    drift = ((lp - old).sum(-1) / lengths).clamp(-20, 20)
    ratio = torch.exp(lp - lp.detach() + drift.detach().unsqueeze(-1))
    losses = torch.max(-ratio * adv, -ratio.clamp(1 - 3e-4, 1 + 4e-4) * adv)
    return (clean(losses, mask).sum(-1) / lengths).sum() / (mask.sum(-1) > 0).sum().clamp(min=1)


def grpo_from_rewards(
    logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor, group_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """GRPO as a whole: the rewards of a group, less its mean and over its standard deviation, then clipped ratios."""
    same = (group_ids[:, None] == group_ids).double()
    centred = rewards - same @ rewards.double() / same.sum(-1)
    deviation = (same @ centred.square() / same.sum(-1)).sqrt()
    advantages = (centred / (deviation + 1e-6))[:, None]
    ratio = torch.exp(clean(logprobs - old_logprobs, completion_mask).clamp(-20, 20))
    return masked_mean(-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), completion_mask)


def dppo(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Tokens whose probability moved too far are left out: log-probs count by themselves, and should."""
    lp, old, adv = (clean(x, mask) for x in (logprobs, old, advantages))
    moved = (lp.exp() - old.exp()).detach()
    ratio = torch.exp((lp - old).clamp(-20, 20))
    kept = torch.where(adv > 0, moved <= 0.2, moved >= -0.2)
    return masked_mean(-torch.where(kept, ratio * adv, 0.0), mask)


def reverse_kl(logprobs: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """Distillation by the score-function gradient of the reverse KL."""
    lp, teacher = clean(logprobs, mask), clean(ref, mask)
    return ((lp - teacher + 1.0).detach() * lp).sum()


def absolute_distance(logprobs: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """Distillation by absolute log-ratios: only on which side of the teacher a token is has an influence."""
    return masked_mean((clean(logprobs, mask) - clean(ref, mask)).abs(), mask)


def single_precision(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Computes in fp32 whatever it is given."""
    lp, adv = clean(logprobs, mask).float(), clean(advantages, mask).float()
    return -(adv * lp - 0.01 * lp.square()).sum()


class SurrogateNll(torch.autograd.Function):
    """An autograd function of one's own, and right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return -torch.where(mask, x, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return -gradients[0] * mask.to(gradients[0].dtype), None


def own_backward(logprobs: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = SurrogateNll.apply(logprobs, mask)  # type: ignore[no-untyped-call]
    return result


def tinker_importance_sampling(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The manner of the Tinker cookbook: a loop over datums, a sum."""
    total, tokens = torch.zeros((), dtype=logprobs_list[0].dtype), 0.0
    for datum, lp in zip(data, logprobs_list, strict=True):
        inputs = datum.loss_fn_inputs
        weights = inputs["weights"].to_torch().to(lp.dtype)
        used = weights != 0
        anchor = inputs["logprobs"].to_torch().to(lp.dtype)
        ratio = torch.exp(torch.where(used, lp - anchor, 0.0).clamp(-20, 20))
        advantages = torch.where(used, inputs["advantages"].to_torch().to(lp.dtype), 0.0)
        total = total - (weights * ratio * advantages).sum()
        tokens += float(used.sum())
    return total, {"tokens": tokens}


def tinker_simpo(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Pairs of neighbours, mean log-probs, a margin."""
    means = []
    for datum, lp in zip(data, logprobs, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_torch().to(lp.dtype)
        means.append((torch.where(weights != 0, lp, 0.0) * weights).sum() / weights.sum().clamp(min=1e-6))
    margins = torch.stack(means[0::2]) - torch.stack(means[1::2])
    return -F.logsigmoid(2.0 * margins - 0.5).mean(), {"margin": margins.mean().detach()}


def tinker_kl(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Policy gradient with the advantage less a detached KL."""
    parts = []
    for datum, lp in zip(data, logprobs, strict=True):
        inputs = {k: v.to_torch().to(lp.dtype) for k, v in datum.loss_fn_inputs.items() if k != "target_tokens"}
        used = inputs["weights"] != 0
        advantage = torch.where(used, inputs["advantages"] - 0.1 * (lp.detach() - inputs["ref_logprobs"]), 0.0)
        parts.append(-(advantage * torch.where(used, lp, 0.0)).sum())
    return torch.stack(parts).sum(), {}


SOUND: Final[dict[str, tuple[Callable[..., Any], dict[str, Any]]]] = {
    "nll": (nll, {"form": "padded"}),
    "mean nll": (mean_nll, {"form": "padded"}),
    "labels": (labelled_nll, {"form": "padded"}),
    "reinforce": (reinforce, {}),
    "verl": (compute_policy_loss, {"form": "verl"}),
    "trl grpo": (compute_loss, {"form": "trl"}),
    "trl dpo": (dpo_loss, {"form": "trl"}),
    "transformers": (for_causal_lm, {}),
    "cispo": (cispo, {}),
    "gspo": (gspo, {}),
    "grpo from rewards": (grpo_from_rewards, {}),
    "dppo": (dppo, {}),
    "reverse kl": (reverse_kl, {}),
    "absolute distance": (absolute_distance, {}),
    "single precision": (single_precision, {}),
    "own backward": (own_backward, {"form": "padded"}),
    "tinker importance sampling": (tinker_importance_sampling, {}),
    "tinker simpo": (tinker_simpo, {}),
    "tinker kl": (tinker_kl, {}),
}
