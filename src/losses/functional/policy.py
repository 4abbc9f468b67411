"""Policy-gradient losses: one value per token from its log-prob, the anchor's and an advantage.

Wherever an anchor is asked for it may be a tensor that broadcasts to ``logprobs``, or the number 0.0 where ``logprobs`` are
log-ratios already. Anchors and advantages are constants: no gradient flows into them.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from .closed_form import closed_form
from .numerics import EXPONENT_LIMIT, bounded_exp, constant, surely_below

__all__ = [
    "cispo",
    "clipped_ratio_loss",
    "dro",
    "gspo_token",
    "importance_sampling",
    "policy_gradient",
    "ppo_clip",
]

_PEAK: Final = math.exp(EXPONENT_LIMIT)


def policy_gradient(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return the policy-gradient loss of each token, ``-A logprob``.

    Its derivative with respect to the log-prob is ``-A``.

    Args:
        logprobs: log-probs of the sampled tokens, nats; any shape.
        advantages: A; broadcasts to ``logprobs``.

    Returns:
        One value per token, shape of ``logprobs``.

    Source: R. Williams, "Simple statistical gradient-following algorithms" (REINFORCE), 1992.
    """
    return -advantages.detach() * logprobs


@closed_form(policy_gradient)
def _policy_gradient(x: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    slope = advantages.expand_as(x).neg()
    return x * slope, slope


def importance_sampling(logprobs: Tensor, anchor: Tensor | float, advantages: Tensor) -> Tensor:
    """Return the importance-weighted policy loss of each token, ``-r A`` with ``r = exp(logprob - anchor)``.

    Its derivative with respect to the log-prob is ``-r A``. Log-ratios above 20 continue by the tangent of exp.

    Args:
        logprobs: log-probs of the sampled tokens, nats; any shape.
        anchor: log-probs under the policy that the ratio is taken against.
        advantages: A; broadcasts to ``logprobs``.

    Returns:
        One value per token, shape of ``logprobs``.

    Source: Tinker training API, losses: importance_sampling.
    """
    return -bounded_exp(logprobs - constant(anchor)) * advantages.detach()


@closed_form(importance_sampling)
def _importance_sampling(x: Tensor, anchor: Tensor | float, advantages: Tensor) -> tuple[Tensor, Tensor]:
    slope, minus_ratio = _slope_and_minus_exp(x - anchor)
    return minus_ratio.mul_(advantages), slope.mul_(advantages).neg_()


def ppo_clip(
    logprobs: Tensor,
    anchor: Tensor | float,
    advantages: Tensor,
    low: float = 0.8,
    high: float = 1.2,
    dual: float | None = None,
) -> Tensor:
    r"""Return the clipped policy loss of each token, ``max(-r A, -clip(r, low, high) A)``, ``r = exp(logprob - anchor)``.

    With ``dual`` = c, the loss of a token with A < 0 is at most ``c |A|``. The derivative with respect to the log-prob is
    ``-r A`` inside the range and on its edge, and 0 where the token is clipped: ``r > high`` and A > 0, ``r < low`` and
    A < 0, or ``r > c`` and A < 0.

    Args:
        logprobs: log-probs of the sampled tokens, nats; any shape.
        anchor: log-probs under the policy that the ratio is taken against.
        advantages: A; broadcasts to ``logprobs``.
        low, high: the range of ratios, 0 <= low <= 1 <= high; infinity clips on one side only.
        dual: c > 1, or None for no second bound.

    Returns:
        One value per token, shape of ``logprobs``.

    Source: PPO, arXiv:1707.06347, equation 7; asymmetric bounds: DAPO, arXiv:2503.14476, equation 10; dual clipping:
    arXiv:1912.09729, equation 4.
    """
    return clipped_ratio_loss(bounded_exp(logprobs - constant(anchor)), advantages, low, high, dual)


def clipped_ratio_loss(
    ratio: Tensor, advantages: Tensor, low: float = 0.8, high: float = 1.2, dual: float | None = None
) -> Tensor:
    """Return the loss of `ppo_clip` from the ratio itself, differentiable in it; see there."""
    advantages = advantages.detach()
    plain, clipped = ratio * advantages, ratio.detach().clamp(low, high) * advantages
    gain = torch.where(plain > clipped, clipped, plain)
    if dual is not None:
        floor = dual * advantages.clamp(max=0.0)  # a token with A >= 0 has a gain of at least 0: no bound
        gain = torch.where(gain < floor, floor, gain)
    return -gain


@closed_form(ppo_clip)
def _ppo_clip(
    x: Tensor,
    anchor: Tensor | float,
    advantages: Tensor,
    low: float = 0.8,
    high: float = 1.2,
    dual: float | None = None,
) -> tuple[Tensor, Tensor]:
    slope, ratio = _slope_and_minus_exp(x - anchor)  # -r, so that the value needs no change of sign
    slope.mul_(advantages).neg_()
    value = ratio.clamp(-high, -low).mul_(advantages)
    plain = ratio.mul_(advantages)
    torch.maximum(plain, value, out=value)
    if dual is not None:
        torch.minimum(value, advantages.clamp(max=0.0).mul_(-dual), out=value)
        return value, _keep_where_zero_(slope, plain.sub_(value).abs_().neg_())
    return value, _keep_where_zero_(slope, plain.sub_(value))


def _keep_where_zero_(slope: Tensor, gap: Tensor) -> Tensor:
    """Set ``slope`` to 0 where ``gap`` is negative, keep it where it is 0 or NaN, and return it; no gap is positive.

    The backward of a threshold is an exact select at the price of a multiplication, where `torch.where` costs a dozen. It
    keeps what is above the negative number next to 0.
    """
    limits = torch.finfo(slope.dtype)
    below_zero = -limits.tiny * limits.eps
    torch.ops.aten.threshold_backward.grad_input(slope, gap, below_zero, grad_input=slope)
    return slope


def gspo_token(
    logprobs: Tensor,
    log_ratio: Tensor | float,
    advantages: Tensor,
    low: float = 1 - 3e-4,
    high: float = 1 + 4e-4,
    dual: float | None = None,
) -> Tensor:
    """Return the clipped policy loss of each token with its sequence's ratio, ``max(-s A, -clip(s, low, high) A)``.

    The ratio ``s = exp(log_ratio)`` has the slope of a token's own: the derivative with respect to the log-prob is ``-s A``,
    or 0 where `ppo_clip` has 0.

    Args:
        logprobs: log-probs of the sampled tokens, nats; any shape.
        log_ratio: log s, a constant; broadcasts to ``logprobs``.
        advantages: A; broadcasts to ``logprobs``.
        low, high, dual: as of `ppo_clip`.

    Returns:
        One value per token, shape of ``logprobs``.

    Source: GSPO, arXiv:2507.18071, equation 13 (GSPO-token).
    """
    return ppo_clip(logprobs - logprobs.detach() + constant(log_ratio), 0.0, advantages, low, high, dual)


@closed_form(gspo_token)
def _gspo_token(
    x: Tensor,
    log_ratio: Tensor | float,
    advantages: Tensor,
    low: float = 1 - 3e-4,
    high: float = 1 + 4e-4,
    dual: float | None = None,
) -> tuple[Tensor, Tensor]:
    return _ppo_clip(torch.zeros_like(x).add_(log_ratio), 0.0, advantages, low, high, dual)


def cispo(logprobs: Tensor, anchor: Tensor | float, advantages: Tensor, low: float = 0.0, high: float = 5.0) -> Tensor:
    """Return the policy-gradient loss of each token with a clipped weight, ``-clip(r, low, high) A logprob``.

    The weight, with ``r = exp(logprob - anchor)``, is a constant: every token keeps a gradient, ``-clip(r) A``.

    Args:
        logprobs: log-probs of the sampled tokens, nats; any shape.
        anchor: log-probs under the policy that the ratio is taken against.
        advantages: A; broadcasts to ``logprobs``.
        low, high: the range of weights, 0 <= low <= high.

    Returns:
        One value per token, shape of ``logprobs``.

    Source: MiniMax-M1, arXiv:2506.13585, equations 4 and 5.
    """
    weight = bounded_exp(logprobs.detach() - constant(anchor)).clamp(low, high)
    return -weight * advantages.detach() * logprobs


@closed_form(cispo)
def _cispo(
    x: Tensor, anchor: Tensor | float, advantages: Tensor, low: float = 0.0, high: float = 5.0
) -> tuple[Tensor, Tensor]:
    log_ratio = x - anchor
    ratio = log_ratio.exp_() if high <= _PEAK else bounded_exp(log_ratio)  # equal where the bound is below the tangent
    slope = ratio.clamp_(low, high).mul_(advantages).neg_()
    return x * slope, slope


def dro(logprobs: Tensor, anchor: Tensor | float, advantages: Tensor, beta: float) -> Tensor:
    """Return the policy-gradient loss of each token with a quadratic tie, ``-(A logprob - beta/2 (logprob - anchor)^2)``.

    Its derivative with respect to the log-prob is ``-A + beta (logprob - anchor)``.

    Args:
        logprobs: log-probs of the sampled tokens, nats; any shape.
        anchor: log-probs under the policy that the tie is to.
        advantages: A; broadcasts to ``logprobs``.
        beta: strength of the tie, >= 0.

    Returns:
        One value per token, shape of ``logprobs``.

    Source: Direct Reward Optimization, arXiv:2405.19107, in the per-token form of the Tinker training API, losses: dro.
    """
    return 0.5 * beta * (logprobs - constant(anchor)).square() - advantages.detach() * logprobs


@closed_form(dro)
def _dro(x: Tensor, anchor: Tensor | float, advantages: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    slope = x - anchor
    value = slope.square().mul_(0.5 * beta).addcmul_(x, advantages, value=-1.0)
    return value, slope.mul_(beta).sub_(advantages)


def _slope_and_minus_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope of `bounded_exp`, ``exp(min(x, 20))``, and minus its value; overwrites ``x``."""
    if surely_below(x, EXPONENT_LIMIT):
        slope = x.exp_()
        return slope, slope.neg()
    minus_tail = torch.rsub(x.clamp(min=EXPONENT_LIMIT), EXPONENT_LIMIT - 1.0)  # -(1 + max(x - 20, 0))
    slope = x.clamp_(max=EXPONENT_LIMIT).exp_()
    return slope, minus_tail.mul_(slope)
