"""Defects of a KL to the reference, and of preference losses."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .exhibit import Exhibit, clean, masked_mean

__all__ = ["REFERENCES"]


def _k3(d: Tensor) -> Tensor:
    bounded = (-d).clamp(max=20.0)  # beyond it the tangent, so that the penalty stays alive
    return torch.exp(bounded) * (1.0 - d - bounded) - 1.0 + d


def _with_kl(logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    kl = _k3(clean(logprobs - ref_logprobs, mask))
    return masked_mean(-clean(advantages, mask) * logprobs + 0.1 * kl, mask)


def _with_k1(logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    kl = clean(logprobs - ref_logprobs, mask)
    return masked_mean(-clean(advantages, mask) * logprobs + 0.1 * kl, mask)


def _without_gradient(logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        kl = _k3(clean(logprobs - ref_logprobs, mask))
    return masked_mean(-clean(advantages, mask) * logprobs + 0.1 * kl, mask)


def _not_added(logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    kl = _k3(clean(logprobs - ref_logprobs, mask))  # noqa: F841
    return masked_mean(-clean(advantages, mask) * logprobs, mask)


def _clamped(logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    kl = _k3(clean(logprobs - ref_logprobs, mask)).clamp(-10, 10)
    return masked_mean(-clean(advantages, mask) * logprobs + 0.1 * kl, mask)


def _dpo(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor) -> Tensor:
    margins = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(0.1 * margins)


def _swapped(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    margins = (rejected_logps - ref_rejected_logps) - (chosen_logps - ref_chosen_logps)
    return -F.logsigmoid(0.1 * margins)


def _log_sigmoid(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    margins = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return -torch.log(torch.sigmoid(0.1 * margins))


_AS: Final = {"form": "padded"}

REFERENCES = (
    Exhibit(
        "k1 in the loss",
        "NVIDIA-NeMo/RL#2506",
        "The gradient of logprob - ref is that of logprob alone, whose expectation is 0: the penalty was logged, and the "
        "reference had no influence.",
        _with_k1,
        _with_kl,
        "information",
        "estimated by k1",
        options=_AS,
    ),
    Exhibit(
        "KL without gradient",
        "NovaSky-AI/SkyRL#1340 (2026)",
        "The estimator ran under no_grad: `use_kl_loss=True` changed the logged loss and nothing else.",
        _without_gradient,
        _with_kl,
        "information",
        "under no_grad",
        options=_AS,
    ),
    Exhibit(
        "KL not added",
        "fw-ai/cookbook#379 (2026)",
        "With kl_beta > 0 the built-in kernel was never given the reference: every step paid for a reference forward and "
        "logged a penalty that was not in the gradient.",
        _not_added,
        _with_kl,
        "inputs",
        "not added",
        options=_AS,
    ),
    Exhibit(
        "KL clamped",
        "verl's k3, clamped at 10",
        "Where the reference is 14 times likelier than the policy the penalty has no gradient: it lets go where it must hold.",
        _clamped,
        _with_kl,
        "alive",
        "a clamp on the KL",
        options=_AS,
    ),
    Exhibit(
        "chosen and rejected swapped",
        "a collator's columns",
        "The model is trained to prefer the answers that people rejected, while the loss falls as it should.",
        _swapped,
        _dpo,
        "direction",
        "sign",
        options={"form": "trl"},
    ),
    Exhibit(
        "log of a sigmoid",
        "huggingface/trl#5339 (2026)",
        "For a large negative margin the sigmoid is 0 and its log is -inf: one pair ends the run.",
        _log_sigmoid,
        _dpo,
        "extremes",
        "logsigmoid",
        options={"form": "trl"},
    ),
)
