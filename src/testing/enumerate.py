"""Exact expectations on small softmax policies: what an estimator's gradient is on average, and how far from its target.

A policy of V tokens at each of T positions has V^T answers, so every expectation is a sum. The bias of a KL estimator, of an
advantage, of a correction or of truncated sampling is a number then, not an argument.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..losses.parts.advantages import group_advantages
from .cases import Case, CaseSequence
from .losscheck.forms import loss_under_test

__all__ = [
    "Bias",
    "Draws",
    "Estimator",
    "SmallPolicy",
    "as_estimator",
    "bias",
    "bias_table",
    "expected_gradient",
    "forward_kl",
    "group_baseline",
    "markdown",
    "negative_reward",
    "reverse_kl",
    "truncated",
]

Estimator = Callable[["Draws"], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Draws:
    """All that can be drawn, with its probability.

    Attributes:
        probability: of each draw under the sampler, [M].
        logprobs: the policy's, [M, ..., T]; differentiable in ``logits``.
        rollout_logprobs, ref_logprobs: the sampler's and the reference's, the same shape.
        rewards: of each answer, [M, ...].
        logits: of the policy, [T, V].
        policy_probability: of each draw under the policy, [M]; differentiable.
    """

    probability: Tensor
    logprobs: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor
    rewards: Tensor
    logits: Tensor
    policy_probability: Tensor


@final
@dataclass(frozen=True, eq=False)
class SmallPolicy:
    """A softmax policy, its sampler, its reference, and a reward for every answer.

    Args:
        logits: [T, V], fp64; of each position, whatever came before.
        rollout: log-probs of the sampler, [T, V]; minus infinity is never drawn.
        reference: log-probs of the reference, [T, V].
        rewards: of each of the V^T answers, in the order of `itertools.product`.
    """

    logits: Tensor
    rollout: Tensor
    reference: Tensor
    rewards: Tensor

    @classmethod
    def random(cls, vocabulary: int = 4, length: int = 1, *, seed: int = 0, staleness: float = 0.0) -> SmallPolicy:
        """Return a policy with random numbers.

        Args:
            vocabulary: V.
            length: T.
            seed: of the numbers.
            staleness: how far the sampler's logits are from the policy's; 0 is on policy.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        logits = normal(length, vocabulary)
        rollout = (logits + staleness * normal(length, vocabulary)).log_softmax(-1)
        return cls(logits, rollout, normal(length, vocabulary).log_softmax(-1), normal(vocabulary**length))

    def draws(self, group: int = 1) -> Draws:
        """Return all answers, [M, T]; or all groups of so many answers, drawn independently, [M, group, T]."""
        length, vocabulary = self.logits.shape
        answers = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
        logits = self.logits.detach().clone().requires_grad_()
        positions = torch.arange(length)
        policy, rollout, reference = (
            table[positions, answers] for table in (logits.log_softmax(-1), self.rollout, self.reference)
        )
        drawn = rollout.isfinite().all(-1).nonzero().flatten()
        index = torch.tensor(list(itertools.product(drawn.tolist(), repeat=group)))
        index = index[:, 0] if group == 1 else index

        def total(table: Tensor) -> Tensor:
            return table[index].reshape(index.shape[0], -1).sum(-1).exp()

        policy_row, rollout_row, ref_row, rewards = (
            table[index] for table in (policy, rollout, reference, self.rewards)
        )
        return Draws(total(rollout), policy_row, rollout_row, ref_row, rewards, logits, total(policy))


def expected_gradient(estimator: Estimator, draws: Draws) -> Tensor:
    """Return ``sum_m q(m) d estimator(m) / d logits``, [T, V]: the sampler's weights are constants.

    Args:
        estimator: from draws to a loss for each, [M, ...]; what it has per token is summed.
        draws: of `SmallPolicy.draws`.
    """
    losses = estimator(draws)
    total = (draws.probability * losses.reshape(losses.shape[0], -1).sum(-1)).sum()
    return torch.autograd.grad(total, draws.logits, retain_graph=True)[0]


def reverse_kl(draws: Draws) -> Tensor:
    """The target ``d KL(policy || reference) / d logits``; of draws of the whole support."""
    return _exact(draws.policy_probability * (draws.logprobs - draws.ref_logprobs).flatten(1).sum(-1), draws)


def forward_kl(draws: Draws) -> Tensor:
    """The target ``d KL(reference || policy) / d logits``."""
    reference = draws.ref_logprobs.flatten(1).sum(-1)
    return _exact(reference.exp() * (reference - draws.logprobs.flatten(1).sum(-1)), draws)


def negative_reward(draws: Draws) -> Tensor:
    """The target ``-d E[reward] / d logits``, times the answers of a group."""
    return _exact(-draws.policy_probability * draws.rewards.reshape(draws.rewards.shape[0], -1).sum(-1), draws)


@final
@dataclass(frozen=True)
class Bias:
    """How an expected gradient compares with its target.

    Attributes:
        estimator, target: their names.
        size: norm of the expected gradient over that of the target; 0 carries no information.
        error: norm of the difference over that of the target; 0 is unbiased.
        cosine: of the angle between both; NaN where the expected gradient is 0.
    """

    estimator: str
    target: str
    size: float
    error: float
    cosine: float

    @property
    def verdict(self) -> str:
        """``zero``, ``exact``, ``scaled`` (another length, the same direction) or ``biased``."""
        if self.size < 1e-9:
            return "zero"
        if self.error < 1e-9:
            return "exact"
        return "scaled" if self.cosine > 1 - 1e-9 else "biased"


def bias(estimator: Estimator, target: Callable[[Draws], Tensor], draws: Draws, name: str = "") -> Bias:
    """Return how the expected gradient of an estimator compares with a target, `reverse_kl` or another function."""
    found, wanted = expected_gradient(estimator, draws), target(draws)
    size, length = float(found.norm()), float(wanted.norm())
    cosine = float((found * wanted).sum()) / (size * length) if size > 1e-12 * length else math.nan
    return Bias(
        name, getattr(target, "__name__", "target"), size / length, float((found - wanted).norm()) / length, cosine
    )


def bias_table(estimators: Mapping[str, Estimator], target: Callable[[Draws], Tensor], draws: Draws) -> list[Bias]:
    """Return the bias of each estimator."""
    return [bias(estimator, target, draws, name) for name, estimator in estimators.items()]


def markdown(rows: Sequence[Bias]) -> str:
    """Return a table of biases for a page."""
    lines = ["| estimator | target | verdict | size | error | cosine |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r.estimator} | {r.target.replace('_', ' ')} | {r.verdict} | {_figure(r.size)} | {_figure(r.error)} | "
        f"{_figure(r.cosine)} |"
        for r in rows
    ]
    return "\n".join(lines)


def _figure(x: float) -> str:
    """Return three digits; what is left by rounding is 0, the same on every machine."""
    return f"{0.0 if abs(x) < 1e-9 else x:.3g}"


def as_estimator(loss: Any, **options: Any) -> Estimator:
    """Return a loss as an estimator: of a `Loss` or a function, whose advantages are the rewards.

    Each answer is a batch of its own, so a mean over the batch is one over the answer.

    Args:
        loss: as of `check_loss`.
        options: as of `check_loss`: form, arguments, ...
    """
    under_test = loss_under_test(loss, **options)

    def estimator(draws: Draws) -> Tensor:
        losses = []
        for m, leaf in enumerate(draws.logprobs):
            plain = [x[m].tolist() for x in (draws.rollout_logprobs, draws.ref_logprobs)]
            ones = [1.0] * leaf.numel()
            rewards = [float(draws.rewards[m])] * leaf.numel()
            row = CaseSequence(leaf.tolist(), ones, rewards, plain[0], plain[0], plain[1])
            losses.append(under_test.value(Case((row,)), [leaf]))
        return torch.stack(losses)

    return estimator


def group_baseline(**options: Any) -> Estimator:
    """Return the policy gradient with `group_advantages` as advantages, of draws of groups; options as of that function."""

    def estimator(draws: Draws) -> Tensor:
        members = draws.rewards.shape[1]
        ids = torch.arange(draws.rewards.shape[0]).repeat_interleave(members)
        advantages = group_advantages(draws.rewards.flatten(), ids, **options).advantages
        return -advantages.view_as(draws.rewards) * draws.logprobs.sum(-1)

    return estimator


def truncated(logprobs: Tensor, *, top_k: int | None = None, top_p: float = 1.0, renormalise: bool = True) -> Tensor:
    """Return the log-probs of a truncated sampler, minus infinity for what it never draws.

    Args:
        logprobs: [T, V].
        top_k: so many of the most probable tokens are kept.
        top_p: the most probable tokens are kept until their probabilities reach it.
        renormalise: give the log-probs that tokens are drawn with, rather than those before truncation.
    """
    ordered, order = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    kept = (before < top_p) & (torch.arange(logprobs.shape[-1]) < (top_k or logprobs.shape[-1]))
    cut = torch.full_like(logprobs, -math.inf).scatter(-1, order, torch.where(kept, ordered, -math.inf))
    return cut.log_softmax(-1) if renormalise else cut


def _exact(terms: Tensor, draws: Draws) -> Tensor:
    return torch.autograd.grad(terms.sum(), draws.logits, retain_graph=True)[0]
