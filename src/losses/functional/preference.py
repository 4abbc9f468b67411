"""Preference losses: one value per pair of a chosen and a rejected response, or per labelled response."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .closed_form import closed_form, pair_form
from .likelihood import nll
from .numerics import capped

__all__ = ["chosen_nll", "dpo", "kto", "log_odds", "log_odds_ratio", "odds_ratio", "reference_point", "simpo"]


def dpo(chosen: Tensor, rejected: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    r"""Return the DPO loss of each pair, ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``, ``z = beta (chosen - rejected)``.

    Its derivative with respect to ``chosen`` is ``beta (e sigmoid(z) - (1 - e) sigmoid(-z))``, and with respect to
    ``rejected`` the opposite.

    Args:
        chosen, rejected: log-ratio of policy to reference of each response, summed over its tokens, nats, [P].
        beta: strength of the tie to the reference, > 0.
        label_smoothing: e, the assumed rate of flipped labels, in [0, 0.5).

    Returns:
        One value per pair, [P].

    Source: DPO, arXiv:2305.18290, equation 7; smoothing: E. Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    margin = beta * (chosen - rejected)
    loss = -logsigmoid(margin)
    return loss if label_smoothing == 0.0 else loss + label_smoothing * margin  # log s(-z) = log s(z) - z


@pair_form(dpo)
def _dpo(sides: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    margin = _difference(sides).mul_(beta)
    value = logsigmoid(margin).neg_()
    if label_smoothing:
        value.add_(margin, alpha=label_smoothing)
    slope = margin.neg_().sigmoid_()
    if label_smoothing:
        slope.sub_(label_smoothing)
    return value, _opposite(slope.mul_(-beta))


def chosen_nll(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the negative log-likelihood of the chosen response of each pair.

    Its derivative with respect to ``chosen`` is -1, and with respect to ``rejected`` 0.

    Args:
        chosen, rejected: mean log-prob of each response, nats, [P].

    Returns:
        One value per pair, [P].

    Source: ORPO, arXiv:2403.07691, equation 6.
    """
    return nll(chosen)


@pair_form(chosen_nll)
def _chosen_nll(sides: Tensor) -> tuple[Tensor, Tensor]:
    return sides[:, 0].neg(), sides.new_tensor([-1.0, 0.0]).expand_as(sides)


def log_odds(logprob: Tensor, max_prob: float) -> Tensor:
    """Return ``log(p / (1 - p))`` of p = exp(logprob), continued by its tangent beyond ``max_prob``.

    The slope 1 / (1 - p) reaches 1e6 for a confident, short response; beyond ``max_prob`` it stays at
    1 / (1 - max_prob).

    Args:
        logprob: log of a probability, nats, at most 0; any shape.
        max_prob: where the tangent takes over, in (0, 1).

    Returns:
        Log odds, shape of ``logprob``.
    """
    limit = math.log(max_prob)
    inside = capped(logprob, limit)
    # Exact to the last digits of the result: where log(1 - p) loses its own, logprob itself is large.
    return inside - inside.expm1().neg().log() + (logprob - limit).relu() / (1.0 - max_prob)


def log_odds_ratio(chosen: Tensor, rejected: Tensor, max_prob: float) -> Tensor:
    """Return ``log odds(p_chosen) - log odds(p_rejected)`` of each pair.

    Args:
        chosen, rejected: mean log-prob of each response, nats, [P].
        max_prob: where the tangent of `log_odds` takes over, in (0, 1).

    Returns:
        One value per pair, [P].

    Source: ORPO, arXiv:2403.07691, equation 4.
    """
    of_chosen, of_rejected = log_odds(torch.stack([chosen, rejected]), max_prob).unbind()
    return of_chosen - of_rejected


def odds_ratio(chosen: Tensor, rejected: Tensor, max_prob: float) -> Tensor:
    """Return the odds-ratio loss of each pair, ``-log sigmoid(z)`` of the log odds ratio z.

    Its derivative with respect to ``chosen`` is ``-sigmoid(-z) / (1 - p_chosen)``, and with respect to ``rejected``
    ``sigmoid(-z) / (1 - p_rejected)``.

    Args:
        chosen, rejected: mean log-prob of each response, nats, [P].
        max_prob: where the tangent of `log_odds` takes over, in (0, 1).

    Returns:
        One value per pair, [P].

    Source: ORPO, arXiv:2403.07691, equation 7.
    """
    return -logsigmoid(log_odds_ratio(chosen, rejected, max_prob))


@pair_form(odds_ratio)
def _odds_ratio(sides: Tensor, max_prob: float) -> tuple[Tensor, Tensor]:
    inside = sides.clamp(max=math.log(max_prob))
    rest = inside.expm1().neg_()  # 1 - p; the slope of the log odds is 1 / (1 - p), on the tangent too
    ratio = _difference((sides - inside).div_(rest).add_(inside).sub_(rest.log()))
    value = logsigmoid(ratio).neg_()
    return value, _opposite(ratio.neg_().sigmoid_().neg_()).div_(rest)


def simpo(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Return the SimPO loss of each pair, ``-log sigmoid(z)``, ``z = beta (chosen - rejected) - gamma``.

    Its derivative with respect to ``chosen`` is ``-beta sigmoid(-z)``, and with respect to ``rejected`` the opposite.

    Args:
        chosen, rejected: mean log-prob of each response, nats, [P].
        beta: scale of the reward, > 0.
        gamma: the margin that is asked for, >= 0, in units of the scaled reward.

    Returns:
        One value per pair, [P].

    Source: SimPO, arXiv:2405.14734, equation 6.
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


@pair_form(simpo)
def _simpo(sides: Tensor, beta: float = 2.0, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    margin = _difference(sides).mul_(beta).sub_(gamma)
    value = logsigmoid(margin).neg_()
    return value, _opposite(margin.neg_().sigmoid_().mul_(-beta))


def kto(
    log_ratio: Tensor,
    label: Tensor,
    reference_point: Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""Return the KTO loss of each labelled response, ``v (1 - sigmoid(z))``, ``z = +- beta (log_ratio - reference_point)``.

    The sign is + and v the ``desirable_weight`` where the response is desirable; - and ``undesirable_weight`` where it is not.
    The derivative with respect to ``log_ratio`` is ``-+ v beta sigmoid(z) sigmoid(-z)``: largest at the reference point, and 0
    for a response that is far from it on either side.

    Args:
        log_ratio: of policy to reference, summed over the response's tokens, nats, [B].
        label: 1 desirable, 0 undesirable, [B].
        reference_point: z0, see `reference_point`; one number, or [B].
        beta: how soon the value of a response saturates, > 0.
        desirable_weight, undesirable_weight: weight of a response by its label, lambda_D and lambda_U.

    Returns:
        One value per response, [B].

    Source: KTO, arXiv:2402.01306, equation 7.
    """
    good = label > 0
    gain = beta * (log_ratio - reference_point)
    # The slope of sigmoid itself, s (1 - s), is 0 where s rounds to 1.
    return torch.where(good, desirable_weight * logsigmoid(-gain).exp(), undesirable_weight * logsigmoid(gain).exp())


@closed_form(kto)
def _kto(
    log_ratio: Tensor,
    label: Tensor,
    reference_point: Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    good = label > 0
    gain = (log_ratio - reference_point).mul_(beta)
    rest = gain.neg().sigmoid_()
    reached = gain.sigmoid_()
    value = torch.where(good, desirable_weight * rest, undesirable_weight * reached)
    slope = rest.mul_(reached).mul_(beta)
    return value, torch.where(good, -desirable_weight * slope, undesirable_weight * slope)


def reference_point(log_ratios: Tensor) -> Tensor:
    """Return KTO's z0, ``max(0, mean(log_ratios))``: an estimate of the KL of policy and reference from mismatched answers.

    Args:
        log_ratios: of policy to reference, summed over the tokens of answers that belong to other prompts, nats, [B]; of all
            ranks. No gradient flows into it.

    Returns:
        One number, 0-d.

    Source: KTO, arXiv:2402.01306, below equation 7.
    """
    return log_ratios.detach().mean().clamp(min=0.0)


def _difference(sides: Tensor) -> Tensor:
    """Return the numbers of the chosen responses less those of the rejected ones, [P]; fresh."""
    chosen, rejected = sides.unbind(1)
    return chosen - rejected


def _opposite(slope: Tensor) -> Tensor:
    """Return the slopes of a function of a difference by both sides, [P, 2]."""
    return torch.stack((slope, -slope), 1)
