"""Defects of what is only compared: anchors, the two sides of a pair, the rewards of a group."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .exhibit import Exhibit, clean, masked_mean

__all__ = ["SHIFTS"]


def _dpo(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor) -> Tensor:
    margins = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    return -F.logsigmoid(0.1 * margins)


def _reference_added(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    return _dpo(chosen_logps, rejected_logps, -ref_chosen_logps, -ref_rejected_logps)


def _softmax(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    chosen, rejected = (0.5 * chosen_logps).exp(), (0.5 * rejected_logps).exp()
    return -torch.log(chosen / (chosen + rejected + 1e-12))


def _log_softmax(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    return -F.logsigmoid(0.5 * (chosen_logps - rejected_logps))


def _probabilities(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = clean(logprobs, mask).exp() / (clean(old, mask).exp() + 1e-8)
    return masked_mean(-ratio * clean(advantages, mask), mask)


def _log_ratio(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(clean(logprobs - old, mask).clamp(-20, 20))
    return masked_mean(-ratio * clean(advantages, mask), mask)


def _weighted_by_probability(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    x, ref = clean(logprobs, mask), clean(ref_logprobs, mask)
    return masked_mean(x.exp() * (x - ref), mask)


def _sampled(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    x, ref = clean(logprobs, mask), clean(ref_logprobs, mask)
    return masked_mean((x - ref).detach() * x, mask)


def _group_baseline(logprobs: Tensor, rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    same = (group_ids[:, None] == group_ids).to(rewards.dtype)
    advantages = rewards - same @ rewards / same.sum(-1)
    return -(advantages[:, None] * clean(logprobs, mask)).sum()


def _batch_baseline(logprobs: Tensor, rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    return _group_baseline(logprobs, rewards, torch.zeros_like(group_ids), mask)


_AS: Final = {"form": "padded"}
_PAIRS: Final = {"form": "trl"}

SHIFTS = (
    Exhibit(
        "reference added",
        "a sign in the margin of the reference",
        "The reference's preference was reversed, so the pairs that it had right already were pushed hardest.",
        _reference_added,
        _dpo,
        "shift",
        "the wrong sign",
        options=_PAIRS,
    ),
    Exhibit(
        "softmax of two responses",
        "Bradley-Terry by exps, with an epsilon",
        "Both probabilities of long responses underflowed to 0, and such pairs taught nothing.",
        _softmax,
        _log_softmax,
        "shift",
        "an exp that underflows",
        options=_PAIRS,
    ),
    Exhibit(
        "ratio of probabilities",
        "an epsilon in place of a difference of logarithms",
        "The ratio of unlikely tokens fell towards 0 although nothing had changed, so rare tokens were hardly trained.",
        _probabilities,
        _log_ratio,
        "shift",
        "an epsilon added",
        options=_AS,
    ),
    Exhibit(
        "KL weighted by a probability",
        "the sum over a vocabulary, F.kl_div, taken of the sampled token alone",
        "Sampled tokens were weighted by their probability twice, so the penalty hardly acted on unlikely ones.",
        _weighted_by_probability,
        _sampled,
        "shift",
        "count by themselves",
        options={**_AS, "invariant": ("anchors",)},
    ),
    Exhibit(
        "baseline of the batch",
        "GRPO snippets with one mean for all prompts",
        "Answers to easy prompts were all reinforced, and answers to hard ones all suppressed.",
        _batch_baseline,
        _group_baseline,
        "shift",
        "not that of the group",
        options=_AS,
    ),
)
