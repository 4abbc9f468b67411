"""Properties of every registered loss, and of what surrounds them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from example_losses.loss_cases import IDS, LOSSES, away_from_kinks, suited
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pullback.errors import (
    BiasedGradientError,
    ConfigError,
    DuplicateLossError,
    EmptyUnitError,
    IncompleteUnitError,
    UnknownLossError,
)
from pullback.losses import (
    DPO,
    GRPO,
    KL,
    ORPO,
    CrossEntropy,
    Loss,
    Registry,
    TokenBatch,
    bounded_exp,
    combine_metrics,
    functional,
    get_loss,
    group_advantages,
    log1mexp,
    recipe,
)
from pullback.losses.evaluation import token_sum
from pullback.testing import Case, CaseSequence, check_loss, cotangent
from pullback.testing.strategies import cases


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
@given(case=cases())
def test_contract(loss: Loss, case: Case) -> None:
    """Gradient = differences; untrained = zero; padded = packed = list; order does not matter."""
    case = suited(loss, case)
    check_loss(loss, case, differences=away_from_kinks(loss, case))


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
@given(case=cases(low=-1e4, high=0.0))
def test_finite_at_extremes(loss: Loss, case: Case) -> None:
    """Log-probs from 0 to -1e4, with ratios that overflow exp, give finite values and gradients."""
    output, found = cotangent(loss, suited(loss, case))
    assert bool(torch.isfinite(output.loss))
    assert bool(torch.isfinite(torch.cat(found)).all())


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
@given(case=cases())
def test_an_infinite_cotangent_stays_where_something_is_trained(loss: Loss, case: Case) -> None:
    """As of a loss that was scaled too far for half precision: what is not trained still gets exactly 0."""
    batch, leaf = suited(loss, case).batch()
    value = loss.evaluate(batch).loss
    (slope,) = torch.autograd.grad(value, leaf, torch.full_like(value, math.inf))
    assert not slope[batch.weight == 0].any()


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_first_and_last_token_count(loss: Loss) -> None:
    """Every trained token, the first and the last too, has a gradient."""
    one = CaseSequence(
        [-1.0, -0.7, -2.0], [1.0] * 3, [1.0, -0.5, 2.0], [-1.05, -0.72, -1.95], [-1.0] * 3, [-1.2, -0.6, -2.5]
    )
    two = CaseSequence([-1.5, -0.4, -1.0], [1.0] * 3, [-1.0, 0.5, 1.0], [-1.45, -0.42, -0.95], [-1.0] * 3, [-1.0] * 3)
    near = tuple(replace(s, old_logprobs=s.rollout_logprobs) for s in (one, two))
    _, found = cotangent(loss, suited(loss, Case(near)))
    silent = isinstance(loss, ORPO) and loss.lam == 0
    assert silent or bool((torch.cat(found) != 0).all())


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
@given(case=cases())
def test_parts_add_up(loss: Loss, case: Case) -> None:
    """Numerators and counts of whole units add up to those of the batch: one division at the end is exact."""
    if "group" in loss.main_aggregation.name:
        case = Case(
            tuple(CaseSequence(**{**vars(s), "group": i // 2}) for i, s in enumerate(case.sequences)), case.with_old
        )
    case = suited(loss, case)
    whole, _ = cotangent(loss, case)
    pieces = [cotangent(loss, case.subset([i, i + 1]))[0] for i in range(0, len(case.sequences), 2)]
    for k, part in enumerate(whole.parts):
        numerator = sum(piece.parts[k].numerator.item() for piece in pieces)
        count = sum(piece.parts[k].count for piece in pieces) if part.denominator != "none" else 1.0
        assert math.isclose(numerator, part.numerator.item(), rel_tol=1e-10, abs_tol=1e-10)
        assert math.isclose(count, part.count, rel_tol=1e-12)
    combined = combine_metrics(piece.metrics for piece in pieces)
    for name in ("loss", "tokens"):
        assert math.isclose(combined[name].value, whole.metrics[name].value, rel_tol=1e-9, abs_tol=1e-9)


def test_multiplied_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a mask that multiplies lets NaN through, and check_loss says so."""
    junk = CaseSequence([math.nan, -1.0], [0.0, 1.0], [math.nan, 1.0], [math.nan, -1.0], [-1.0, -1.0], [math.nan, -1.1])
    check_loss(GRPO(), Case((junk, junk)))
    monkeypatch.setattr(token_sum, "select_", lambda values, weights: values * weights)
    with pytest.raises(AssertionError):
        check_loss(GRPO(), Case((junk, junk)))


def test_shifted_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a mask that is off by one gives an untrained token a gradient."""
    one = CaseSequence([-1.0, -2.0, -0.5], [0.0, 1.0, 1.0], [1.0] * 3, [-1.0] * 3, [-1.0] * 3, [-1.0] * 3)
    rolled = property(lambda self: self.weights.roll(-1))
    monkeypatch.setattr(TokenBatch, "weight", rolled)
    monkeypatch.setattr(TokenBatch, "trained", property(lambda self: self.weights.roll(-1) != 0))
    with pytest.raises(AssertionError, match="untrained"):
        check_loss(CrossEntropy(), Case((one, one)))


def test_kl_gradients_by_enumeration() -> None:
    """Expected gradients on a softmax policy: reverse is exact on and off policy, k1 is zero, k3 is the forward KL's."""
    generator = torch.Generator().manual_seed(0)
    logits, reference, rollout = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    log_ref, log_rollout = reference.log_softmax(-1), rollout.log_softmax(-1)

    def expected(kl: KL, sampler: Tensor) -> Tensor:
        policy = logits.log_softmax(-1)
        penalty = kl.penalty(policy, log_ref, (policy - sampler).exp())
        (gradient,) = torch.autograd.grad((sampler.exp().detach() * penalty).sum(), logits)
        return gradient

    policy = logits.log_softmax(-1)
    (reverse,) = torch.autograd.grad((policy.exp() * (policy - log_ref)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((log_ref.exp() * (log_ref - policy)).sum(), logits)
    on = logits.detach().log_softmax(-1)
    for estimator, sampler in itertools.product(("k1", "k2", "k3"), (on, log_rollout)):
        assert torch.allclose(expected(KL(estimator, gradient="reverse"), sampler), reverse, atol=1e-14)  # type: ignore[arg-type]
    assert torch.allclose(expected(KL("k2", gradient="pathwise"), on), reverse, atol=1e-14)
    assert torch.allclose(expected(KL("k3", gradient="pathwise"), on), forward, atol=1e-14)
    assert float(expected(KL("k1", gradient="pathwise", acknowledge_biased=True), on).norm()) < 1e-15
    assert not torch.allclose(expected(KL("k3", importance=False), log_rollout), reverse, atol=1e-3)
    assert not torch.allclose(forward, reverse, atol=1e-3)


@given(d=st.floats(-50, 50))
def test_k3_is_not_negative(d: float) -> None:
    """k3 is at least 0, and 0 only where the log-probs are equal."""
    value = functional.kl(torch.tensor(d, dtype=torch.float64), 0.0).item()
    assert value >= 0
    assert functional.kl(torch.zeros(()), 0.0).item() == 0


@pytest.mark.parametrize("estimator", ["k1", "abs"])
def test_biased_kl_is_refused(estimator: str) -> None:
    """k1 and abs in the loss need an acknowledgement."""
    with pytest.raises(BiasedGradientError, match="acknowledge_biased"):
        KL(estimator, gradient="pathwise")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="True or False, got 'no'"):
        KL(estimator, gradient="pathwise", acknowledge_biased="no")  # type: ignore[arg-type]


@given(x=st.floats(-700, -1e-12))
@example(x=-1e-12)
@example(x=-1e-3)
@example(x=-0.4)
@example(x=-0.9)
@example(x=-50.0)
@example(x=-math.inf)
def test_log1mexp(x: float) -> None:
    """log(1 - e^x) is accurate at both ends, and so is its gradient."""
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = log1mexp(at)
    (gradient,) = torch.autograd.grad(value, at)
    exact = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert math.isclose(value.item(), exact, rel_tol=1e-9, abs_tol=1e-300)
    assert math.isclose(gradient.item(), -math.exp(x) / -math.expm1(x), rel_tol=1e-9, abs_tol=1e-300)


@given(x=st.floats(-100, 1e4))
def test_bounded_exp(x: float) -> None:
    """exp below the limit; beyond it the tangent, whose slope is never zero."""
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(bounded_exp(at), at)
    assert math.isclose(slope.item(), math.exp(min(x, 20.0)), rel_tol=1e-12)


def test_orpo_caps_and_counts() -> None:
    """A response of probability near 1 gets the capped factor, and is counted; an empty one is refused."""
    sure = CaseSequence([-1e-9], [1.0], [1.0], [-1.0], [-1.0], [-1.0])
    other = CaseSequence([-1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0])
    output, (_, gradient) = cotangent(ORPO(1.0), Case((other, sure)))
    assert output.metrics["odds_capped"].value == 1
    assert 0.9e4 < gradient.item() <= 1.0001e4
    empty = CaseSequence([-1.0], [0.0], [1.0], [-1.0], [-1.0], [-1.0])
    for loss in (ORPO(), DPO()):
        with pytest.raises(EmptyUnitError, match="sequences \\[1\\]"):
            cotangent(loss, Case((other, empty)))


@given(
    rewards=st.lists(st.floats(-3, 3), min_size=1, max_size=9),
    groups=st.lists(st.integers(0, 3), min_size=9, max_size=9),
    leave=st.booleans(),
    std=st.booleans(),
)
def test_group_advantages(rewards: list[float], groups: list[int], leave: bool, std: bool) -> None:
    """Advantages equal plain loops over the groups."""
    ids = groups[: len(rewards)]
    found = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(ids),
        baseline="leave_one_out" if leave else "mean",
        scale="std" if std else "none",
    ).advantages.tolist()
    for i, reward in enumerate(rewards):
        members = [r for r, g in zip(rewards, ids, strict=True) if g == ids[i]]
        if max(members) == min(members):
            assert found[i] == 0.0
            continue
        mean = math.fsum(members) / len(members)
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in members) / (len(members) - 1))
        want = (reward - mean) / (spread + 1e-6 if std else 1.0)
        want *= len(members) / (len(members) - 1) if leave else 1.0
        assert math.isclose(found[i], want, rel_tol=1e-6, abs_tol=1e-6)


def test_group_advantages_without_signal() -> None:
    """Seven equal rewards give exactly 0 (not rounding residue), a single one too, and both are counted."""
    found = group_advantages(torch.tensor([0.1] * 7 + [5.0]), torch.tensor([0] * 7 + [1]))
    assert found.advantages.tolist() == [0.0] * 8
    assert (found.singletons, found.equal) == (1, 1)


def test_registry() -> None:
    """Names are unique, unknown ones list the known, misspelt keys are corrected."""
    mine = Registry()
    assert mine.register(DPO) is DPO
    mine.register(DPO)
    with pytest.raises(DuplicateLossError, match="dpo"):
        mine.register(type("Other", (), {"name": "dpo"}))
    with pytest.raises(UnknownLossError, match="did you mean 'grpo'"):
        get_loss("gprpo")
    with pytest.raises(ConfigError, match="did you mean 'kl_beta'"):
        get_loss("grpo", {"kl_bta": 0.1})
    assert get_loss("grpo", {"kl_beta": 0.1}) == GRPO(kl=KL(beta=0.1))


def test_recipes() -> None:
    """The recipe table: only GRPO's raw sum is normalised by the optimizer step."""
    found = {name: recipe(name).normalization for name in ("sft", "grpo", "dpo", "kto", "orpo")}
    assert found == {"sft": None, "grpo": "num_loss_tokens", "dpo": None, "kto": None, "orpo": None}
    assert all(recipe(name).loss.normalization == mode for name, mode in found.items())


def test_pairs_by_id_in_any_order() -> None:
    """pair_id and role find the pairs wherever they stand; half a pair is refused."""
    logprobs = torch.arange(4.0)
    batch = TokenBatch.from_packed(
        logprobs, [1] * 4, pair_id=torch.tensor([9, 2, 2, 9]), role=torch.tensor([0, 1, 0, 1])
    )
    assert (batch.pairs.chosen.tolist(), batch.pairs.rejected.tolist()) == ([1, 3], [2, 0])
    half = TokenBatch.from_packed(
        logprobs, [1] * 4, pair_id=torch.tensor([9, 2, 2, 8]), role=torch.tensor([0, 1, 0, 1])
    )
    with pytest.raises(IncompleteUnitError, match="pair_id"):
        _ = half.pairs
