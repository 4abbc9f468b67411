"""Defects of policy and preference losses: anchors, references, clamps, detached parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .exhibit import Exhibit, clean, masked_mean

__all__ = ["POLICIES"]


def _ratio(logprobs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return torch.exp(clean(logprobs - old, mask).clamp(-20, 20))


def _clipped(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio, a = _ratio(logprobs, old, mask), clean(advantages, mask)
    return masked_mean(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a), mask)


def _no_ratio(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-clean(advantages, mask) * logprobs, mask)


def _overflows(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio, a = torch.exp(clean(logprobs - old, mask)), clean(advantages, mask)
    return masked_mean(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a), mask)


def _shifted_anchor(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = _ratio(logprobs, clean(old, mask).roll(1, -1), mask)
    return masked_mean(-ratio * clean(advantages, mask), mask)


def _aligned(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-_ratio(logprobs, old, mask) * clean(advantages, mask), mask)


def _whitened(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    a = clean(advantages, mask)
    mean = masked_mean(a, mask)
    spread = masked_mean((a - mean).square(), mask).add(1e-8).sqrt()
    return -(clean((a - mean) / spread, mask) * clean(logprobs, mask)).sum()


def _policy_gradient(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(clean(advantages, mask) * clean(logprobs, mask)).sum()


def _all_detached(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(clean(logprobs, mask) * 0.0)
    return -(clean(advantages, mask) * ratio).sum()


def _on_policy_ratio(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    x = clean(logprobs, mask)
    return -(clean(advantages, mask) * torch.exp(x - x.detach())).sum()


def _with_kl(kl: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a policy gradient with a KL penalty, of the log-ratio to the reference."""

    def loss(logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(-clean(advantages, mask) * logprobs + 0.1 * kl(clean(logprobs - ref_logprobs, mask)), mask)

    return loss


def _k3(d: Tensor) -> Tensor:
    bounded = (-d).clamp(max=20.0)
    return torch.exp(bounded) * (1.0 - d - bounded) - 1.0 + d


def _k3_plain(d: Tensor) -> Tensor:
    return torch.exp((-d).clamp(-20, 20)) - 1.0 + d


def _k3_detached(d: Tensor) -> Tensor:
    with torch.no_grad():
        return _k3(d)


_KL: Final = _with_kl(_k3)


def _lost_kl(logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    _k3(clean(logprobs - ref_logprobs, mask))
    return masked_mean(-clean(advantages, mask) * logprobs, mask)


def _not_detached(logprobs: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    weight = _ratio(logprobs, rollout, mask).clamp(max=5.0)
    return -(weight * clean(advantages, mask) * clean(logprobs, mask)).sum()


def _detached(logprobs: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    weight = _ratio(logprobs, rollout, mask).clamp(max=5.0).detach()
    return -(weight * clean(advantages, mask) * clean(logprobs, mask)).sum()


def _open_advantages(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return _policy_gradient(logprobs, advantages, mask)


def _closed_advantages(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return _policy_gradient(logprobs, advantages.detach(), mask)


def _centred(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """A baseline from the log-probs of the whole batch, which is called a loss of tokens."""
    x = clean(logprobs, mask)
    return -(clean(advantages, mask) * (x - x.mean().detach()) * x).sum()


def _squared(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(clean(advantages, mask) * (clean(logprobs, mask).exp())).sum()


class _Baseline:
    """Subtracts a running mean of the advantages, which it keeps from call to call."""

    def __init__(self, moves: bool) -> None:
        self._mean, self._moves = 0.0, moves

    def __call__(self, logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        a = clean(advantages, mask)
        if self._moves:
            self._mean = 0.9 * self._mean + 0.1 * float(a.mean())
        return -(clean(a - self._mean, mask) * clean(logprobs, mask)).sum()


def _noisy(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs * (1.0 + 0.1 * torch.rand_like(logprobs)), mask)


def _quiet(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask)


def _squeezed(logprobs: Tensor, mask: Tensor) -> Tensor:
    rows = clean(-logprobs, mask).squeeze()
    return (rows.sum(-1) / mask.sum(-1).clamp(min=1).squeeze())[: rows.shape[0]].sum()


def _not_squeezed(logprobs: Tensor, mask: Tensor) -> Tensor:
    return (clean(-logprobs, mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum()


def _dpo(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor) -> Tensor:
    margins = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(0.1 * margins)


def _swapped(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    return _dpo(rejected_logps, chosen_logps, ref_rejected_logps, ref_chosen_logps)


def _log_sigmoid(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    margins = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return -torch.log(torch.sigmoid(margins))


def _half(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    d = clean(logprobs.bfloat16() - ref_logprobs.bfloat16(), mask)
    return (d.square() * 100).sum() + clean(logprobs, mask).bfloat16().pow(3).sum()


def _neighbours(logprobs: Tensor, mask: Tensor) -> Tensor:
    rows = clean(-logprobs, mask).sum(-1)
    return (rows * torch.arange(1, rows.shape[0] + 1)).sum()


_AS = {"form": "padded"}

POLICIES = (
    Exhibit("k1 in the loss", "NVIDIA-NeMo/RL#2506", _with_kl(lambda d: d), _KL, "information", "estimated by k1", _AS),
    Exhibit(
        "KL without gradient", "NovaSky-AI/SkyRL#1340", _with_kl(_k3_detached), _KL, "information", "detached", _AS
    ),
    Exhibit("KL not added", "fw-ai/cookbook#379", _lost_kl, _KL, "inputs", "not added", _AS),
    Exhibit(
        "KL clamped",
        "verl's k3, clamped at 10",
        _with_kl(lambda d: _k3(d).clamp(-10, 10)),
        _KL,
        "alive",
        "a clamp on the KL",
        _AS,
    ),
    Exhibit("anchor without influence", "linkedin/Liger-Kernel#1082", _no_ratio, _clipped, "inputs", "not used", _AS),
    Exhibit(
        "ratio overflows", "verl before its bound of 20", _overflows, _clipped, "extremes", "an exp overflows", _AS
    ),
    Exhibit("anchor shifted", "OpenRLHF/OpenRLHF#973", _shifted_anchor, _aligned, "alignment", "shifted", _AS),
    Exhibit(
        "advantages whitened",
        "GRPO snippets that z-score the batch",
        _whitened,
        _policy_gradient,
        "scale",
        "normalised",
        _AS,
    ),
    Exhibit(
        "surrogate simplified",
        "meta-pytorch/torchforge#571",
        _all_detached,
        _on_policy_ratio,
        "influence",
        "no gradient",
        _AS,
    ),
    Exhibit(
        "weight not detached",
        "CISPO without its stop-gradient",
        _not_detached,
        _detached,
        "closed_form",
        "a detach is missing",
        {
            **_AS,
            "expected": lambda case: [
                [
                    -min(2.718281828459045 ** (x - r), 5.0) * a if w else 0.0
                    for x, r, a, w in zip(s.logprobs, s.rollout_logprobs, s.advantages, s.weights, strict=True)
                ]
                for s in case.sequences
            ],
        },
    ),
    Exhibit(
        "advantages not detached",
        "rewards with a KL, given with their graph",
        _open_advantages,
        _closed_advantages,
        "constants",
        "advantages is not detached",
        {**_AS, "detached": ("advantages",)},
    ),
    Exhibit(
        "wrong kind",
        "a loss that calls itself constant",
        _squared,
        _policy_gradient,
        "kind",
        "declare 'token'",
        {**_AS, "kind": "constant"},
    ),
    Exhibit(
        "wrong kind, of a batch",
        "statistics of the batch",
        _centred,
        _policy_gradient,
        "kind",
        "declare 'batch'",
        {**_AS, "kind": "token"},
    ),
    Exhibit(
        "state between calls", "a running baseline", _Baseline(True), _Baseline(False), "stateless", "running mean", _AS
    ),
    Exhibit(
        "random",
        "dropout in the policy only, unslothai/unsloth-zoo#832",
        _noisy,
        _quiet,
        "deterministic",
        "random",
        _AS,
    ),
    Exhibit("squeezed", "any squeeze() without a dimension", _squeezed, _not_squeezed, "few", "squeeze", _AS),
    Exhibit(
        "chosen and rejected swapped", "a collator's columns", _swapped, _dpo, "direction", "sign", {"form": "trl"}
    ),
    Exhibit("log of a sigmoid", "huggingface/trl#5339", _log_sigmoid, _dpo, "extremes", "logsigmoid", {"form": "trl"}),
    Exhibit(
        "order matters",
        "packed rows taken for one, google/tunix#1662",
        _neighbours,
        _not_squeezed,
        "permutation",
        "order",
        _AS,
    ),
)
