"""The step: AdamW as `torch.optim.AdamW` has it, seen through log-probs alone.

Weights cannot be read by the verbs, so each rule is asked as an equality of two runs. A step of learning rate 1e-12 moves no
weight but fills the moments; a gradient is multiplied by c where all weights of a datum are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from ....backends.types import AdamParams
from ...under_test import BackendUnderTest
from ..actions import Action, descent, each, gradient, gradient_norm, scaled, step, train
from ..check import Evidence, check, require

__all__ = ["OPTIMIZER"]

_STILL: Final = 1e-12  # a learning rate that moves no weight


@check("a bias correction that is missing or counts from 0, betas of an earlier step, or an eps inside the root")
def steps_match_adamw(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Moments, bias correction and eps are torch.optim.AdamW's: a step after others is a first step of another size."""
    data, params = under_test.data(), under_test.params
    for factors in ((1.0,), (3.0, 1.0), (0.5, 4.0, 1.0)):
        *before, _ = factors
        history = [train(replace(params, learning_rate=_STILL), [scaled(data, c)]) for c in before]
        found = under_test.after(each(*history, train(params, [data])))
        expected = under_test.after(train(_as_first_step([(c, params) for c in factors]), [data]))
        words = f"step {len(factors)} after gradients of {factors[:-1]} times its own"
        evidence.note(**{f"step {len(factors)}": under_test.require_same(words, expected, found)})


@check("an optimizer that is made once, with the hyperparameters of the first step")
def hyperparameters_are_of_each_step(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Learning rate, betas and eps are those that come with a step, not those of an earlier one."""
    data, params = under_test.data(), under_test.params
    earlier = replace(params, learning_rate=_STILL, beta1=0.5, beta2=0.7, eps=1.0, weight_decay=0.1)
    found = under_test.after(each(train(earlier, [scaled(data, 3.0)]), train(params, [data])))
    expected = under_test.after(train(_as_first_step([(3.0, earlier), (1.0, params)]), [data]))
    evidence.note(difference=under_test.require_same("a step after one with other hyperparameters", expected, found))


@check("an eps under the root, or one that is scaled by the bias correction")
def epsilon_stands_beside_the_root(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """With an eps far above the gradient a step is lr / eps times the gradient, at any betas."""
    data, params = under_test.data(), descent(under_test)
    expected = under_test.after(train(params, [data]))
    smaller = replace(params, learning_rate=params.learning_rate / 10, eps=params.eps / 10)
    evidence.note(both_divided_by_ten=_same(under_test, "lr and eps divided by 10", expected, train(smaller, [data])))
    averaging = replace(params, beta1=0.9, beta2=0.95)
    evidence.note(with_betas=_same(under_test, "a first step with betas", expected, train(averaging, [data])))


@check("a decay that is added to the gradient (as L2), is ignored, or is not multiplied by the learning rate")
def decay_is_decoupled(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Weight decay multiplies the weights by 1 - lr * weight_decay, whatever the gradient and eps."""
    data = under_test.data()
    start = train(under_test.params, [data])

    def decays(*sizes: tuple[float, float]) -> Action:
        """Decay without a gradient to speak of: the datum's weights are tiny, and eps is large."""
        hollow = gradient(scaled(data, 1e-6))
        params = [AdamParams(lr, 0.0, 0.0, 1e6, decay) for lr, decay in sizes]
        return each(start, *(each(hollow, step(one)) for one in params))

    trained = under_test.after(start)
    once = under_test.after(decays((1.0, 0.51)))
    moved = float((once - trained).norm() / (trained - under_test.start()).norm())
    evidence.note(effect_of_a_decay_by_half=moved)
    require(moved > 10 * under_test.tolerance, "with eps far above the gradient, weight_decay has no effect")
    for words, sizes in {"0.3 twice": ((1.0, 0.3), (1.0, 0.3)), "half the rate": ((0.5, 1.02),)}.items():
        same = _same(under_test, f"a decay of 0.51, and {words}", once, decays(*sizes))
        evidence.note(**{words: same})


@check("clipping that is ignored, or goes by each element or parameter instead of the norm of all")
def gradients_are_clipped_by_their_norm(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A gradient longer than grad_clip_norm is shortened to it, and a shorter one is left alone."""
    data, params, norm = under_test.data(), descent(under_test), gradient_norm(under_test)
    evidence.note(gradient_norm=norm)
    expected = under_test.after(train(params, [data]))
    loose = replace(params, grad_clip_norm=4 * norm)
    evidence.note(loose=_same(under_test, "a clip of four times the norm", expected, train(loose, [data])))
    tight = replace(params, grad_clip_norm=norm / 4, learning_rate=4 * params.learning_rate)
    words = "a clip to a quarter of the norm, at four times the rate"
    evidence.note(tight=_same(under_test, words, expected, train(tight, [data])))
    longer = train(tight, [scaled(data, 3.0)])
    evidence.note(longer=_same(under_test, "the same of a gradient three times as long", expected, longer))


@check("clipping of the sum before it is divided")
def clipping_follows_normalization(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """The gradient is divided first and clipped then."""
    data, params, norm = under_test.data(), descent(under_test), gradient_norm(under_test)
    count = sum(int((d.loss_fn_inputs["weights"].to_torch() != 0).sum()) for d in data)
    large = replace(params, learning_rate=count * params.learning_rate)
    unclipped = under_test.after(each(gradient(data), step(large, "num_loss_tokens")))
    clipped = each(gradient(data), step(replace(large, grad_clip_norm=norm / 2), "num_loss_tokens"))
    evidence.note(
        difference=_same(under_test, "a clip that the mean does not reach, but the sum does", unclipped, clipped)
    )


def _same(under_test: BackendUnderTest, what: str, expected: torch.Tensor, action: Action) -> float:
    return under_test.require_same(what, expected, under_test.after(action))


def _as_first_step(steps: Sequence[tuple[float, AdamParams]]) -> AdamParams:
    """Return the first step that equals the last of several whose gradients are multiples of one.

    With gradients c_i g the corrected moments are p g and s^2 g^2, so lr p g / (s |g| + eps) is a first step of learning rate
    lr p / s and eps / s. p and s are those of `torch.optim.AdamW` on one number.

    Args:
        steps: for each, by what the gradient is multiplied, and its hyperparameters.
    """
    number, last = torch.zeros((), dtype=torch.float64, requires_grad=True), steps[-1][1]
    adamw = torch.optim.AdamW([number], weight_decay=0.0)
    for factor, params in steps:
        number.grad = torch.full_like(number, factor)
        adamw.param_groups[0].update(lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=params.eps)
        adamw.step()
    moments = adamw.state[number]
    mean = float(moments["exp_avg"]) / (1 - last.beta1 ** len(steps))
    root = (float(moments["exp_avg_sq"]) / (1 - last.beta2 ** len(steps))) ** 0.5
    return replace(last, learning_rate=last.learning_rate * mean / root, eps=last.eps / root)


OPTIMIZER: Final = (
    steps_match_adamw,
    hyperparameters_are_of_each_step,
    epsilon_stands_beside_the_root,
    decay_is_decoupled,
    gradients_are_clipped_by_their_norm,
    clipping_follows_normalization,
)
