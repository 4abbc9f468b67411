"""Defects of sums and counts: what a loss is divided by, how often, and what becomes of nothing."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .exhibit import Exhibit, clean, masked_mean

__all__ = ["SUMS"]


def _nll(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask)


def _nll_sum(logprobs: Tensor, weights: Tensor) -> Tensor:
    return -(clean(logprobs, weights != 0) * weights).sum()


def _padding_counted(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -clean(logprobs, mask).mean()


def _twice_divided(logprobs: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(-logprobs, mask) / mask.sum().clamp(min=1)


def _mean_of_means(logprobs: Tensor, mask: Tensor) -> Tensor:
    pieces = zip(logprobs.split(3), mask.split(3), strict=True)
    return torch.stack([masked_mean(-lp, m) for lp, m in pieces]).mean()


def _weighted_twice(logprobs: Tensor, weights: Tensor) -> Tensor:
    return -(clean(logprobs, weights != 0) * weights * weights).sum()


def _unguarded(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -clean(logprobs, mask).sum() / mask.sum()


def _largest(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    return masked_mean(-logprobs, mask), {"surprise": float((-logprobs.detach())[mask.bool()].max())}


def _largest_guarded(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    return masked_mean(-logprobs, mask), {"surprise": float(clean(-logprobs.detach(), mask).max())}


def _squeezed(logprobs: Tensor, mask: Tensor) -> Tensor:
    rows = clean(-logprobs, mask).squeeze()
    return (rows.sum(-1) / mask.sum(-1).clamp(min=1).squeeze())[: rows.shape[0]].sum()


def _not_squeezed(logprobs: Tensor, mask: Tensor) -> Tensor:
    return (clean(-logprobs, mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum()


def _neighbours(logprobs: Tensor, mask: Tensor) -> Tensor:
    rows = clean(-logprobs, mask).sum(-1)
    return (rows * torch.arange(1, rows.shape[0] + 1)).sum()


def _rows(logprobs: Tensor, mask: Tensor) -> Tensor:
    rows = clean(-logprobs, mask).sum(-1)
    return rows.sum()


_PADDED: Final = {"form": "padded"}

SUMS = (
    Exhibit(
        "padding counted",
        "PrimeIntellect-ai/prime-rl#683 (2025)",
        "The mean included the padding, so the step became the smaller the more uneven the lengths of a batch were.",
        _padding_counted,
        _nll,
        "layouts",
        "padding included",
        options=_PADDED,
    ),
    Exhibit(
        "divided twice",
        "fw-ai/cookbook#223 (2026)",
        "The client divided by its tokens and the service did so again: gradients were divided by the square of the "
        "number of tokens.",
        _twice_divided,
        _nll,
        "splits",
        "divided by trained tokens twice",
        options=_PADDED,
    ),
    Exhibit(
        "mean of means",
        "huggingface/transformers#34191 (2024)",
        "Gradient accumulation averaged the means of micro-batches of unequal lengths: the same data in other micro-batches "
        "trained another model. It took four repairs in two years.",
        _mean_of_means,
        _nll,
        "splits",
        "a mean of means",
        options=_PADDED,
    ),
    Exhibit(
        "weighted twice",
        "hiyouga/LLaMA-Factory#6722 (2025)",
        "The length normalisation was applied to a mean, so that long answers hardly counted.",
        _weighted_twice,
        _nll_sum,
        "weights_once",
        "applied twice",
        options=_PADDED,
    ),
    Exhibit(
        "0/0",
        "NVIDIA-NeMo/Automodel#3796 (2026)",
        "A batch without a trained token gave NaN in three of four losses: the choice of the loss decided whether the run "
        "survived.",
        _unguarded,
        _nll,
        "nothing_trained",
        "clamp the count",
        options=_PADDED,
    ),
    Exhibit(
        "maximum of nothing",
        "cua-lite#18",
        "A line that only logs a maximum ended the job on the first batch in which nothing was left to train.",
        _largest,
        _largest_guarded,
        "nothing_trained",
        "a metric must not raise",
        options=_PADDED,
    ),
    Exhibit(
        "squeezed",
        "any squeeze() without a dimension",
        "With one sequence, or sequences of one token, another axis is summed over, often without an error.",
        _squeezed,
        _not_squeezed,
        "few",
        "squeeze",
        options=_PADDED,
    ),
    Exhibit(
        "order matters",
        "packed rows taken for one, google/tunix#1662",
        "Packed rows were treated as one sequence each, so every mean over sequences depended on who lay beside whom.",
        _neighbours,
        _rows,
        "permutation",
        "order",
        options=_PADDED,
    ),
)
