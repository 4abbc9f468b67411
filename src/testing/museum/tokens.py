"""Defects of masks, shifts and directions: which tokens count."""

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


def _untrained_counted(logprobs: Tensor, mask: Tensor, attention_mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, attention_mask)


def _trained_only(logprobs: Tensor, mask: Tensor, attention_mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask.bool() & attention_mask.bool())


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


class _Once(torch.autograd.Function):
    """A backward that multiplies by it once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return 2.0 * -clean(x, mask).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * -2.0 * mask.to(gradients[0].dtype), None


def _fused(logprobs: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = _Doubled.apply(logprobs, mask)  # type: ignore[no-untyped-call]
    return result


def _fused_right(logprobs: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = _Once.apply(logprobs, mask)  # type: ignore[no-untyped-call]
    return result


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
        "fw-ai/cookbook#388 (2026)",
        "Pairs that differ in their first token had margin 0, loss log 2 and no gradient at all; a supervised example of one "
        "token was not trained.",
        _first_dropped,
        _nll,
        "influence",
        "first token is dropped",
        options=_PADDED,
    ),
    Exhibit(
        "last token dropped",
        "verl-project/verl#3562 (2025)",
        "The end-of-sequence token was never trained, and the models did not stop talking.",
        _last_dropped,
        _nll,
        "influence",
        "last token is dropped",
        options=_PADDED,
    ),
    Exhibit(
        "mask rolled",
        "verl-project/verl#5797 (2026)",
        "One bit of the mask leaked into the next document of a packed row: the loss was 5.6 instead of 2.6.",
        _rolled,
        _nll,
        "untrained",
        "shifted by one token",
        options=_PADDED,
    ),
    Exhibit(
        "mask multiplies",
        "NovaSky-AI/SkyRL#1635 (2026)",
        "NaN at a masked position survived the multiplication, because 0 * NaN is NaN: KL and loss of the step read NaN.",
        _multiplied,
        _nll,
        "poison",
        "a mask that multiplies",
        options=_PADDED,
    ),
    Exhibit(
        "prompt trained",
        "huggingface/trl#1516 (2024)",
        "ORPO's likelihood term was taken over the prompt or over the completion, changed back and forth in three releases; "
        "runs of different versions trained different objectives.",
        _untrained_counted,
        _trained_only,
        "untrained",
        "the whole text",
        options=_PADDED,
    ),
    Exhibit(
        "sign",
        "Snowflake-AI-Research/Arctic-Platform#110",
        "A dropped sign maximises the loss; a test for a finite, non-zero gradient stayed green.",
        _turned_around,
        _nll,
        "direction",
        "sign",
        options=_PADDED,
    ),
    Exhibit(
        "wrong backward",
        "linkedin/Liger-Kernel#968 (2025)",
        "A fused kernel returned the right loss and plausible but wrong gradients for more than a year.",
        _fused,
        _fused_right,
        "differences",
        "2 times",
        options=_PADDED,
        shown=(_Doubled, _Once),
    ),
    Exhibit(
        "sequence skipped",
        "thinking-machines-lab/tinker-cookbook#507",
        "Where all advantages were 0 the loss was connected to nothing and the client raised, the likelier the better the "
        "policy became.",
        _skips,
        _keeps,
        "connected",
        "skipped",
    ),
)
