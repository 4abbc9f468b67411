"""Log-probs of chosen tokens from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import Head

__all__ = ["head_logits", "selected_logprobs"]


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return the logits of ``hidden`` [N, H] in fp32 or better, [N, V]."""
    product = hidden.to(head.weight.dtype) @ head.weight.T
    logits = product if product.dtype == torch.float64 else product.float()
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.bias is not None:
        logits = logits + head.bias.to(logits.dtype)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def selected_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Log-prob of each target token, ``logit_t - logsumexp(logits)``.

    Args:
        hidden: [N, H], any float dtype.
        head: the output projection.
        targets: int64 [N], or [N, K] for K candidates per position.

    Returns:
        [N] or [N, K] in nats, fp32 (fp64 for an fp64 head): the sum over the vocabulary never runs in half precision.

    The logits of all N positions are held until the backward, N * V numbers of four bytes: pass only the positions that
    are needed.
    """
    logits = head_logits(hidden, head)
    chosen = logits.gather(-1, targets if targets.dim() == 2 else targets[:, None])
    logprobs = chosen - torch.logsumexp(logits, -1, keepdim=True)
    return logprobs if targets.dim() == 2 else logprobs[:, 0]
