"""The row pass: from raw products to log-probs, and to the gradient with respect to the logits. In place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head import Head

__all__ = ["Rows", "entropy_gradient", "nll_gradient_", "row_pass_", "shape_logits_", "sharpen_", "to_product_"]


class Rows(NamedTuple):
    """What one pass over a block of logits found.

    Attributes:
        logprobs: fp32 (fp64) [C, K].
        others: [C]; the probability of all tokens but the first target, summed without it (1 - p_t would cancel).
        entropy: [C], nats; None if it was not asked for.
        slope: [C, V]; derivative of the soft cap; None without one.
    """

    logprobs: Tensor
    others: Tensor
    entropy: Tensor | None
    slope: Tensor | None


def sharpen_(z: Tensor, h: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Put the targets' own products in fp32 among half-precision ones, in place: rounding them would show in full.

    A product rounded to bf16 is off by up to 0.4 %; in the sum over the vocabulary such errors average out, in the
    target's own logit they do not.

    Args:
        z: fp32 [C, V], rounded products.
        h, weight: half precision [C, H], [V, H].
        targets: int64 [C].
    """
    z.scatter_(-1, targets[:, None], (h.float() * weight[targets].float()).sum(-1, keepdim=True))


def row_pass_(z: Tensor, targets: Tensor, head: Head, temperature: float, entropy: bool) -> Rows:
    """Turn products ``h @ W^T`` into probabilities, in place, and return what else the rows say.

    A log-prob near zero comes from the sum of the other tokens' probabilities, ``log1p(-sum)``: it and ``1 - p_t`` keep
    their relative precision where ``logit - logsumexp`` has none left.

    Args:
        z: fp32 or fp64 [C, V]; overwritten by ``p``.
        targets: int64 [C, K].
        head: its scale, bias and soft cap are applied here.
        temperature: divides the logits.
        entropy: compute it.
    """
    slope = shape_logits_(z, head, temperature)
    highest = z.amax(-1, keepdim=True)
    chosen = z.gather(-1, targets) - highest
    torch.softmax(z, -1, out=z)
    logprobs = chosen + z.amax(-1, keepdim=True).log()
    first = targets[:, :1]
    kept = z.gather(-1, first)
    others = z.scatter_(-1, first, 0.0).sum(-1)
    z.scatter_(-1, first, kept)
    confident = (targets == first) & (others < 0.5)[:, None]
    logprobs = torch.where(confident, torch.log1p(-others.clamp(max=0.5))[:, None], logprobs)
    return Rows(logprobs, others, torch.special.entr(z).sum(-1) if entropy else None, slope)


def shape_logits_(z: Tensor, head: Head, temperature: float) -> Tensor | None:
    """Make logits of products, in place; return the slope of the soft cap."""
    slope = None
    if head.scale != 1.0:
        z.mul_(head.scale)
    if head.bias is not None:
        z.add_(head.bias.to(z.dtype))
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = 1 - z.square()
        z.mul_(head.softcap)
    if temperature != 1.0:
        z.div_(temperature)
    return slope


def nll_gradient_(p: Tensor, targets: Tensor, others: Tensor) -> Tensor:
    """Turn probabilities into ``p - onehot(t)``, the gradient of -logprob, in place.

    The subtraction comes before the product with W: ``p @ W - W[t]`` cancels where the model is confident.
    """
    return p.scatter_(-1, targets, -others[:, None])


def entropy_gradient(p: Tensor, entropy: Tensor) -> Tensor:
    """Return the gradient of the entropy with respect to the logits, ``-p (log p + entropy)``, [C, V]."""
    information: Tensor = torch.special.entr(p)
    return information.sub_(p * entropy[:, None])


def to_product_(dlogits: Tensor, slope: Tensor | None) -> Tensor:
    """Carry a gradient back through the soft cap, in place; scale and temperature are the caller's."""
    return dlogits if slope is None else dlogits.mul_(slope)
