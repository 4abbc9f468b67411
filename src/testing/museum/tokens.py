"""Defects of masks, shifts and normalisation: which tokens count, and by how much."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from .exhibit import Exhibit, clean, masked_mean

__all__ = ["TOKENS"]


def _nll(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask)


def _nll_sum(logprobs: Tensor, weights: Tensor) -> Tensor:
    return -(clean(logprobs, weights != 0) * weights).sum()


def _first_dropped(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask.bool() & (mask.cumsum(-1) > 1))


def _last_dropped(logprobs: Tensor, mask: Tensor) -> Tensor:
    later = mask.flip(-1).cumsum(-1).flip(-1)
    return masked_mean(-logprobs, mask.bool() & (later > 1))


def _rolled(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask.roll(1, -1))


def _multiplied(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -(logprobs * mask).sum() / mask.sum().clamp(min=1)


def _padding_counted(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -clean(logprobs, mask).mean()


def _untrained_counted(logprobs: Tensor, mask: Tensor, attention_mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, attention_mask)


def _trained_only(logprobs: Tensor, mask: Tensor, attention_mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask.bool() & attention_mask.bool())


def _twice_divided(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask) / mask.sum().clamp(min=1)


def _mean_of_means(logprobs: Tensor, mask: Tensor) -> Tensor:
    pieces = zip(logprobs.split(3), mask.split(3), strict=True)
    return torch.stack([_nll(lp, m) for lp, m in pieces]).mean()


def _weighted_twice(logprobs: Tensor, weights: Tensor) -> Tensor:
    return -(clean(logprobs, weights != 0) * weights * weights).sum()


def _unguarded(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -clean(logprobs, mask).sum() / mask.sum()


def _largest(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    return _nll(logprobs, mask), {"surprise": float((-logprobs.detach())[mask.bool()].max())}


def _largest_guarded(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    return _nll(logprobs, mask), {"surprise": float(clean(-logprobs.detach(), mask).max())}


def _graph_in_metrics(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = _nll(logprobs, mask)
    return loss, {"nll": loss}


def _plain_metrics(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    loss = _nll(logprobs, mask)
    return loss, {"nll": loss.item()}


def _overwritten(logprobs: Tensor, weights: Tensor) -> Tensor:
    weights /= weights.sum().clamp(min=1e-9)
    return _nll_sum(logprobs, weights)


def _copied(logprobs: Tensor, weights: Tensor) -> Tensor:
    return _nll_sum(logprobs, weights / weights.sum().clamp(min=1e-9))


def _turned_around(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(logprobs, mask)


class _Doubled(torch.autograd.Function):
    """A backward that multiplies by the reduction's factor a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return 2.0 * -clean(x, mask).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * -4.0 * mask.to(gradients[0].dtype), None


def _fused(logprobs: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = _Doubled.apply(logprobs, mask)  # type: ignore[no-untyped-call]
    return result


def _not_fused(logprobs: Tensor, mask: Tensor) -> Tensor:
    return 2.0 * -clean(logprobs, mask).sum()


def _skips(data: Any, logprobs: Any) -> tuple[Tensor, dict[str, float]]:
    used = [(d.loss_fn_inputs["weights"].to_torch().to(lp.dtype), lp) for d, lp in zip(data, logprobs, strict=True)]
    return torch.stack([_nll_sum(lp, w) for w, lp in used if bool(w.any())]).sum(), {}


def _keeps(data: Any, logprobs: Any) -> tuple[Tensor, dict[str, float]]:
    used = [(d.loss_fn_inputs["weights"].to_torch().to(lp.dtype), lp) for d, lp in zip(data, logprobs, strict=True)]
    return torch.stack([_nll_sum(lp, w) for w, lp in used]).sum(), {}


_PADDED: Final = {"form": "padded"}

TOKENS = (
    Exhibit(
        "first token dropped",
        "fw-ai/cookbook#388",
        _first_dropped,
        _nll,
        "influence",
        "first token is dropped",
        _PADDED,
    ),
    Exhibit(
        "last token dropped",
        "verl-project/verl#3562",
        _last_dropped,
        _nll,
        "influence",
        "last token is dropped",
        _PADDED,
    ),
    Exhibit("mask rolled", "verl-project/verl#5797", _rolled, _nll, "untrained", "shifted by one token", _PADDED),
    Exhibit("mask multiplies", "NovaSky-AI/SkyRL#1635", _multiplied, _nll, "poison", "a mask that multiplies", _PADDED),
    Exhibit(
        "padding counted",
        "PrimeIntellect-ai/prime-rl#683",
        _padding_counted,
        _nll,
        "layouts",
        "padding included",
        _PADDED,
    ),
    Exhibit("prompt trained", "huggingface/trl#1516", _untrained_counted, _trained_only, "untrained", "mask", _PADDED),
    Exhibit(
        "divided twice",
        "fw-ai/cookbook#223",
        _twice_divided,
        _nll,
        "splits",
        "divided by trained tokens twice",
        _PADDED,
    ),
    Exhibit(
        "mean of means", "huggingface/transformers#34191", _mean_of_means, _nll, "splits", "a mean of means", _PADDED
    ),
    Exhibit(
        "weighted twice",
        "hiyouga/LLaMA-Factory#6722",
        _weighted_twice,
        _nll_sum,
        "weights_once",
        "applied twice",
        _PADDED,
    ),
    Exhibit("0/0", "NVIDIA-NeMo/Automodel#3796", _unguarded, _nll, "nothing_trained", "clamp the count", _PADDED),
    Exhibit(
        "maximum of nothing",
        "cua-lite#18",
        _largest,
        _largest_guarded,
        "nothing_trained",
        "a metric must not raise",
        _PADDED,
    ),
    Exhibit(
        "graph in metrics",
        "any logger that keeps tensors",
        _graph_in_metrics,
        _plain_metrics,
        "metrics",
        "detach",
        _PADDED,
    ),
    Exhibit("input overwritten", "TRL's WPO weights", _overwritten, _copied, "pure", "in place", _PADDED),
    Exhibit("sign", "Snowflake-AI-Research/Arctic-Platform#110", _turned_around, _nll, "direction", "sign", _PADDED),
    Exhibit("wrong backward", "linkedin/Liger-Kernel#968", _fused, _not_fused, "differences", "2 times", _PADDED),
    Exhibit("sequence skipped", "thinking-machines-lab/tinker-cookbook#507", _skips, _keeps, "connected", "skipped"),
)
