"""More sound losses, in other styles still: classes, einsum, vmap, chunks, packed rows; and more of the literature's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.losses.functional import bounded_exp, log1mexp

__all__ = ["MORE_SOUND"]


def clean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return clean(values, mask).sum() / mask.sum().clamp(min=1)


@final
@dataclass(frozen=True)
class ClippedSurrogate:
    """A class without state: PPO's clipped surrogate (arXiv:1707.06347), a mean over sequences of means over tokens."""

    epsilon: float = 0.2

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        difference, a = clean(logprobs - old_logprobs, mask).clamp(-20, 20), clean(advantages, mask)
        ratio = torch.exp(difference)
        losses = torch.maximum(-ratio * a, -ratio.clamp(1 - self.epsilon, 1 + self.epsilon) * a)
        lengths = mask.sum(-1)
        rows = clean(losses, mask).sum(-1) / lengths.clamp(min=1)
        return rows.sum() / (lengths > 0).sum().clamp(min=1), {"ratio": masked_mean(ratio, mask).detach()}


def einsum_nll(logprobs: Tensor, weights: Tensor) -> Tensor:
    """One product of tensors, after masking."""
    return -torch.einsum("bt,bt->", clean(logprobs, weights != 0), weights)


def vmapped(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """A loss of one row, mapped over rows."""

    def row(lp: Tensor, adv: Tensor, m: Tensor) -> Tensor:
        return -(torch.where(m, adv, 0.0) * torch.where(m, lp, 0.0)).sum()

    return torch.func.vmap(row)(logprobs, advantages, mask).sum()


def chunked(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Two columns at a time, as a fused head learns them; one division at the end."""
    total = logprobs.new_zeros(())
    for start in range(0, logprobs.shape[1], 2):
        total = total - clean(logprobs[:, start : start + 2], mask[:, start : start + 2]).sum()
    return total / mask.sum().clamp(min=1)


def selected(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Packed by boolean indexing: what is masked does not take part at all."""
    chosen = mask.bool()
    return -(advantages[chosen] * logprobs[chosen]).sum() + 0.0 * clean(logprobs, mask).sum()


def focal(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Focal loss (arXiv:1708.02002) of the target's probability, gamma 2."""
    lp = clean(logprobs, mask)
    return masked_mean(-torch.expm1(lp).square() * lp, mask)


def unlikelihood(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Likelihood of what is good, unlikelihood (arXiv:1908.04319) of what is bad."""
    lp, a = clean(logprobs, mask).float(), clean(advantages, mask).float()
    unlikely = -log1mexp(torch.where(mask.bool(), lp, -1.0).clamp(max=-1e-6))
    return torch.where(a > 0, -a * lp, -a * unlikely).sum()


def smoothed(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Label smoothing (arXiv:1512.00567), transformers-shaped."""
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:]
    total = F.cross_entropy(
        logits.double().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum", label_smoothing=0.1
    )
    return total / num_items_in_batch.clamp(min=1)


def with_z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and the z-loss of PaLM (arXiv:2204.02311), over trained positions."""
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:]
    log_z, trained = logits.double().logsumexp(-1), targets != -100
    nll = log_z - logits.double().gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    terms = torch.where(trained, nll + 1e-4 * log_z.square(), 0.0)
    return terms.sum() / trained.sum().clamp(min=1)


def with_entropy_bonus(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Policy gradient, and the score-function gradient of the entropy of the samples."""
    lp, a = clean(logprobs, mask), clean(advantages, mask)
    return masked_mean(-a * lp + 0.01 * (lp.detach() + 1.0) * lp, mask)


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Distillation by the forward KL at given candidates: the teacher's probability weighs."""
    student, teacher = clean(student_logprobs, mask), clean(teacher_logprobs, mask)
    terms = torch.exp(teacher) * (teacher - student)
    return clean(terms, mask).sum()


def reward_weighted(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Reward-weighted regression (Peters and Schaal, 2007): weights that are exponentials of the advantage."""
    return masked_mean(-torch.exp(clean(advantages, mask)) * clean(logprobs, mask), mask)


def advantage_weighted(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantage-weighted regression (arXiv:1910.00177): the same, with weights up to 20."""
    weight = torch.exp(clean(advantages, mask) / 0.5).clamp(max=20.0)
    return masked_mean(-weight * clean(logprobs, mask), mask)


def leave_one_out(logprobs: Tensor, advantages: Tensor, group_id: Tensor, mask: Tensor) -> Tensor:
    """RLOO (arXiv:2402.14740) of rewards [B]: each less the mean of the others of its group; alone it says nothing."""
    same = (group_id[:, None] == group_id[None, :]).to(advantages.dtype)
    others = same.sum(-1) - 1
    total = same @ advantages - advantages
    signal = torch.where(others > 0, advantages - total / others.clamp(min=1), 0.0)
    return -(signal * clean(logprobs, mask).sum(-1)).sum()


def quadratic(logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """DRO (arXiv:2405.19107), the policy's part: -A lp + tau / 2 (lp - ref)^2."""
    lp, ref, a = clean(logprobs, mask), clean(ref_logprobs, mask), clean(advantages, mask)
    return masked_mean(-a * lp + 0.05 * (lp - ref).square(), mask)


def decoupled(
    log_prob: Tensor, old_log_prob: Tensor, rollout_log_probs: Tensor, advantages: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The manner of verl: a ratio to the recomputed anchor, weighted by a truncated one to the sampler."""
    lp, old, rollout, a = (clean(x, response_mask) for x in (log_prob, old_log_prob, rollout_log_probs, advantages))
    weight = torch.exp((old - rollout).clamp(-20, 20)).clamp(max=2.0).detach()
    ratio = torch.exp((lp - old).clamp(-20, 20))
    losses = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a) * weight
    return masked_mean(losses, response_mask), masked_mean(weight, response_mask)


def slic(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """SLiC-HF (arXiv:2305.10425): a hinge; a pair that is told apart has no gradient."""
    return torch.relu(1.0 - (chosen_logps - rejected_logps)).mean()


def ipo(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor) -> Tensor:
    """IPO (arXiv:2310.12036)."""
    margins = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (margins - 1 / (2 * 0.1)).square()


def cpo(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """CPO (arXiv:2401.08417): a preference without a reference, and a likelihood of what was chosen."""
    return -F.logsigmoid(0.1 * (chosen_logps - rejected_logps)) - 0.5 * chosen_logps


def conservative_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> dict[str, Tensor]:
    """DPO with labels that are wrong one time in ten; a dict of results."""
    margins = 0.1 * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    losses = -0.9 * F.logsigmoid(margins) - 0.1 * F.logsigmoid(-margins)
    return {"loss": losses.mean(), "accuracy": (margins > 0).double().mean()}


def kto(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """KTO (arXiv:2402.01306) without its estimate of the KL: single sequences, each labelled good or bad."""
    losses = []
    for datum, lp in zip(data, logprobs, strict=True):
        inputs = datum.loss_fn_inputs
        used = inputs["weights"].to_torch() != 0
        gain = torch.where(used, lp - inputs["ref_logprobs"].to_torch().to(lp.dtype), 0.0).sum()
        sign = 1.0 if int(inputs["label"].to_torch()[0]) else -1.0
        losses.append(1.0 - torch.sigmoid(0.1 * sign * gain))
    return torch.stack(losses).sum(), {"sequences": float(len(losses))}


def reinforce_with_baseline(
    data: Sequence[Any], logprobs: Sequence[Tensor], baseline: float = 0.1
) -> tuple[Tensor, dict[str, float]]:
    """REINFORCE with a fixed baseline, the manner of a cookbook: a list of losses, summed."""
    losses = []
    for datum, lp in zip(data, logprobs, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_torch().to(lp.dtype)
        reward = datum.loss_fn_inputs["advantages"].to_torch().to(lp.dtype)
        signal = torch.where(weights != 0, weights * (reward - baseline), 0.0)
        losses.append(-(signal * torch.where(weights != 0, lp, 0.0)).sum())
    return torch.stack(losses).sum(), {"largest": math.fsum(float(x.detach()) for x in losses)}


def partly_single(logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """A policy gradient in the precision that is given, and a KL in fp32, whose small values are mostly rounding."""
    lp, ref, a = (clean(x, mask) for x in (logprobs, ref_logprobs, advantages))
    distance = (ref - lp).float()
    return masked_mean(0.04 * (bounded_exp(distance) - distance - 1) - a * lp, mask)


def geometric_mean(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """GMPO, in the manner of verl: one advantage for a sequence, the mean of its tokens'."""
    lp, old, a = (clean(x, mask) for x in (logprobs, old_logprobs, advantages))
    lengths = mask.sum(1).clamp(min=1)
    sign = (a.sum(1, keepdim=True) > 0).to(lp.dtype) * 2 - 1
    clipped = sign * (sign * (lp - old)).clamp(max=0.4)
    ratio = bounded_exp(clean(clipped, mask).sum(1) / lengths)
    return -(a.sum(1) / lengths * ratio).sum() / mask.any(1).sum().clamp(min=1)


PADDED: Final = {"form": "padded"}
TRL: Final = {"form": "trl"}

MORE_SOUND: Final[dict[str, tuple[Callable[..., Any], dict[str, Any]]]] = {
    "class": (ClippedSurrogate(), {}),
    "einsum": (einsum_nll, PADDED),
    "vmap": (vmapped, {}),
    "chunks": (chunked, PADDED),
    "boolean index": (selected, {}),
    "focal": (focal, PADDED),
    "unlikelihood": (unlikelihood, {}),
    "label smoothing": (smoothed, {}),
    "z-loss": (with_z_loss, {}),
    "entropy bonus": (with_entropy_bonus, {}),
    "forward kl": (forward_kl, {}),
    "reward-weighted": (reward_weighted, {}),
    "advantage-weighted": (advantage_weighted, {}),
    "leave one out": (leave_one_out, {**PADDED, "per_sequence": ["advantages"]}),
    "dro": (quadratic, {}),
    "geometric mean": (geometric_mean, {}),
    "kl in fp32": (partly_single, {}),
    "decoupled": (decoupled, {"form": "verl"}),
    "slic": (slic, TRL),
    "ipo": (ipo, TRL),
    "cpo": (cpo, TRL),
    "conservative dpo": (conservative_dpo, TRL),
    "kto": (kto, {}),
    "reinforce with a baseline": (reinforce_with_baseline, {}),
}
