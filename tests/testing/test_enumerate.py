"""Exact expectations: what is known of estimators in closed form is what the enumeration says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pullback.losses import GRPO, KL, ImportanceSampling
from pullback.losses.functional import kl, kl_penalty
from pullback.testing.enumerate import (
    Draws,
    SmallPolicy,
    as_estimator,
    bias,
    bias_table,
    expected_gradient,
    forward_kl,
    group_baseline,
    markdown,
    negative_reward,
    reverse_kl,
    truncated,
)

policies = st.builds(
    SmallPolicy.random,
    vocabulary=st.integers(2, 4),
    length=st.integers(1, 2),
    seed=st.integers(0, 99),
    staleness=st.just(0.0),
)


def ratio(draws: Draws, cap: float = float("inf")) -> Tensor:
    """The detached ratio of policy to sampler of each answer, [M, 1]."""
    return (draws.logprobs - draws.rollout_logprobs).sum(-1, keepdim=True).detach().exp().clamp(max=cap)


@given(policies)
def test_targets_are_the_textbook_gradients(policy: SmallPolicy) -> None:
    """For one token the gradient of -E[R] is -p (R - E[R]), that of the reverse KL p (D - KL), of the forward one p - ref."""
    if policy.logits.shape[0] > 1:
        return
    draws = policy.draws()
    p, ref = policy.logits.softmax(-1)[0], policy.reference[0]
    d = p.log() - ref
    assert torch.allclose(negative_reward(draws)[0], -p * (policy.rewards - (p * policy.rewards).sum()))
    assert torch.allclose(reverse_kl(draws)[0], p * (d - (p * d).sum()))
    assert torch.allclose(forward_kl(draws)[0], p - ref.exp())


@given(policies)
def test_kl_in_the_loss(policy: SmallPolicy) -> None:
    """On policy k1 is zero, k2 and the reverse gradient are exact for one token, k3 is the forward KL's gradient."""
    draws = replace_length_one(policy).draws()

    def verdict(estimator: str, target: object = reverse_kl) -> str:
        return bias(lambda d: kl(d.logprobs, d.ref_logprobs, estimator), target, draws).verdict  # type: ignore[arg-type]

    assert verdict("k1") == "zero"
    assert verdict("k2") == "exact"
    assert verdict("k3") == "biased" or draws.logits.shape[1] == 2  # two tokens have one direction
    assert verdict("k3", forward_kl) == "exact"


def replace_length_one(policy: SmallPolicy) -> SmallPolicy:
    return SmallPolicy(
        policy.logits[:1], policy.rollout[:1], policy.reference[:1], policy.rewards[: policy.logits.shape[1]]
    )


@given(st.integers(0, 50), st.sampled_from(["k1", "k2", "k3"]))
def test_off_policy(seed: int, estimator: str) -> None:
    """With stale samples the ratio makes the reverse gradient and the policy gradient exact; truncated or left out, biased."""
    draws = SmallPolicy.random(4, 1, seed=seed, staleness=0.7).draws()

    def penalty(d: Draws) -> Tensor:
        return kl_penalty(d.logprobs, d.ref_logprobs, estimator, "reverse")  # type: ignore[arg-type]

    assert bias(lambda d: ratio(d) * penalty(d), reverse_kl, draws).verdict == "exact"
    assert bias(penalty, reverse_kl, draws).verdict == "biased"
    assert bias(lambda d: -ratio(d)[:, 0] * d.rewards * d.logprobs.sum(-1), negative_reward, draws).verdict == "exact"
    assert bias(lambda d: -d.rewards * d.logprobs.sum(-1), negative_reward, draws).verdict == "biased"
    largest = float(ratio(draws).max())
    cut = bias(lambda d: -ratio(d, 0.9 * largest)[:, 0] * d.rewards * d.logprobs.sum(-1), negative_reward, draws)
    assert cut.verdict == "biased"


@given(st.integers(0, 50))
def test_group_advantages(seed: int) -> None:
    """Leave-one-out is unbiased; the group's own mean scales by (n - 1) / n; dividing by the deviation biases."""
    draws = SmallPolicy.random(3, 1, seed=seed).draws(group=3)
    assert bias(group_baseline(baseline="leave_one_out", scale="none"), negative_reward, draws).error < 1e-9
    own = bias(group_baseline(scale="none"), negative_reward, draws)
    assert own.verdict == "scaled"
    assert own.size == pytest.approx(2 / 3)
    assert bias(group_baseline(), negative_reward, draws).verdict == "biased"


def test_truncated_sampling() -> None:
    """Of answers that a truncated sampler never draws nothing is learnt, whatever the ratio; half its log-probs add up to 1."""
    policy = SmallPolicy.random(5, 1, seed=3)
    sampler = truncated(policy.logits.log_softmax(-1), top_p=0.7)
    assert torch.allclose(sampler.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    assert int(truncated(policy.logits.log_softmax(-1), top_k=2).isfinite().sum()) == 2
    draws = replace(policy, rollout=sampler).draws()
    assert draws.probability.numel() < 5
    exact = negative_reward(policy.draws())
    found = expected_gradient(lambda d: -ratio(d)[:, 0] * d.rewards * d.logprobs.sum(-1), draws)
    assert float((found - exact).norm()) > 1e-2


@given(st.integers(0, 20))
def test_losses_as_estimators(seed: int) -> None:
    """Registered losses and functions: importance sampling is exact off policy, and so is the default KL."""
    stale = SmallPolicy.random(4, 2, seed=seed, staleness=0.5).draws()
    still = SmallPolicy.random(4, 1, seed=seed).draws()
    assert bias(as_estimator(GRPO(None, None)), negative_reward, still).verdict == "exact"
    one = SmallPolicy.random(4, 1, seed=seed, staleness=0.5).draws()
    assert bias(as_estimator(ImportanceSampling()), negative_reward, one).verdict == "exact"
    assert bias(as_estimator(ImportanceSampling()), negative_reward, stale).verdict == "biased"  # a ratio per token
    only_kl = replace_rewards(one)
    assert bias(as_estimator(GRPO(None, KL("k3", 1.0))), reverse_kl, only_kl).verdict == "exact"
    k1 = KL("k1", 1.0, "pathwise", importance=False, acknowledge_biased=True)
    assert bias(as_estimator(GRPO(None, k1)), reverse_kl, replace_rewards(still)).verdict == "zero"


def replace_rewards(draws: Draws) -> Draws:
    return replace(draws, rewards=torch.zeros_like(draws.rewards))


def one_kl(draws: Draws, estimator: str) -> Tensor:
    return kl(draws.logprobs, draws.ref_logprobs, estimator)  # type: ignore[arg-type]


def test_table() -> None:
    """A table for a page has a line for each estimator."""
    draws = SmallPolicy.random().draws()
    estimators = {name: partial(one_kl, estimator=name) for name in ("k1", "k2", "k3")}
    rows = bias_table(estimators, reverse_kl, draws)
    assert [row.verdict for row in rows] == ["zero", "exact", "biased"]
    assert "| k1 | reverse kl | zero | " in markdown(rows)
