"""Every loss's gradient equals its closed form, written out as plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.losses import (
    AGGREGATIONS,
    CISPO,
    DPO,
    DRO,
    GRPO,
    GSPO,
    KL,
    KTO,
    ORPO,
    PPO,
    ClipRange,
    CrossEntropy,
    ImportanceSampling,
    Loss,
    SimPO,
    fixed_length,
    preset,
)
from pullback.testing import Case, CaseSequence, cotangent, oracles
from pullback.testing.strategies import cases

TOKEN_AGGREGATIONS = [name for name, known in AGGREGATIONS.items() if known.fits("token")]


def agrees(loss: Loss, case: Case, expected: list[list[float]]) -> bool:
    """True if the loss's cotangent is the expected one, to 1e-12."""
    _, found = cotangent(loss, case)
    want = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
    have = torch.cat(found)
    return bool((want - have).norm() <= 1e-12 * max(1.0, float(want.norm())))


@pytest.mark.parametrize("aggregation", TOKEN_AGGREGATIONS)
@given(case=cases())
def test_cross_entropy(aggregation: str, case: Case) -> None:
    """Cross-entropy's gradient is the negative weight over its denominator."""
    assert agrees(CrossEntropy(aggregation), case, oracles.cross_entropy(case, aggregation))


@given(case=cases(), length=st.floats(1, 100))
def test_fixed_length(case: Case, length: float) -> None:
    """A fixed length divides every sequence alike."""
    assert agrees(CrossEntropy(fixed_length(length)), case, oracles.cross_entropy(case, "fixed_length", length))


@pytest.mark.parametrize("aggregation", TOKEN_AGGREGATIONS)
@given(case=cases())
def test_grpo(aggregation: str, case: Case) -> None:
    """GRPO's gradient is the clipped ratio's plus the unbiased reverse KL's."""
    expected = oracles.grpo(case, aggregation, beta=0.3)
    assert agrees(GRPO(kl=KL(beta=0.3), aggregation=aggregation), case, expected)


@pytest.mark.parametrize(
    ("kl", "form", "importance"),
    [
        (KL("k2", 0.2, "pathwise"), "k2", True),
        (KL("k3", 0.2, "pathwise"), "k3", True),
        (KL("k3", 0.2, "pathwise", importance=False), "k3", False),
        (KL("k1", 0.2, "pathwise", acknowledge_biased=True), "k1", True),
        (KL("k1", 0.2, "reverse", importance=False), "reverse", False),
        (KL("k3", 0.2, "none"), "none", True),
    ],
)
@given(case=cases())
def test_kl_gradient_modes(kl: KL, form: str, importance: bool, case: Case) -> None:
    """Each estimator and gradient mode has the slope that its docstring states."""
    expected = oracles.grpo(case, beta=0.2, kl=form, importance=importance)
    assert agrees(GRPO(kl=kl), case, expected)


@given(case=cases())
def test_sums_of_the_protocol(case: Case) -> None:
    """ppo and importance_sampling are sums over tokens."""
    assert agrees(PPO(), case, oracles.grpo(case, "sum"))
    assert agrees(ImportanceSampling(), case, oracles.grpo(case, "sum", clip_range=None))


@given(case=cases())
def test_seed_preset(case: Case) -> None:
    """The acknowledged preset has its KL as k1 in the loss: a constant on every token."""
    expected = oracles.grpo(
        case, "sequence_mean_token_sum", clip_range=None, beta=0.001, kl="k1", ratio=False, importance=False
    )
    assert agrees(preset("seed:grpo"), case, expected)


@given(case=cases(), beta=st.floats(0.01, 2), smoothing=st.floats(0, 0.49))
def test_dpo(case: Case, beta: float, smoothing: float) -> None:
    """DPO's gradient is beta times a sigmoid of the margin, label smoothing included."""
    assert agrees(DPO(beta, smoothing), case, oracles.dpo(case, beta, smoothing))


@given(case=cases(), beta=st.floats(0.1, 4), gamma=st.floats(0, 2))
def test_simpo(case: Case, beta: float, gamma: float) -> None:
    """SimPO's gradient is that of mean log-probs with a margin."""
    assert agrees(SimPO(beta, gamma), case, oracles.simpo(case, beta, gamma))


@given(case=cases(empty=True), beta=st.floats(0.01, 2), weights=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)))
def test_kto(case: Case, beta: float, weights: tuple[float, float]) -> None:
    """KTO's gradient is largest at the reference point, with a weight and a sign by the label."""
    assert agrees(KTO(beta, *weights), case, oracles.kto(case, beta, *weights))
    assert agrees(KTO(beta, *weights, "zero"), case, oracles.kto(case, beta, *weights, zero=True))


@pytest.mark.parametrize("aggregation", TOKEN_AGGREGATIONS)
@given(case=cases(), beta=st.floats(0.01, 2))
def test_cispo_and_dro(aggregation: str, case: Case, beta: float) -> None:
    """CISPO's gradient is a clipped ratio times the advantage, DRO's a difference of log-probs less the advantage."""
    assert agrees(CISPO(aggregation=aggregation), case, oracles.cispo(case, aggregation))
    assert agrees(CISPO(ClipRange(0.5, 1.5), aggregation), case, oracles.cispo(case, aggregation, 0.5, 1.5))
    assert agrees(DRO(beta, aggregation), case, oracles.dro(case, aggregation, beta))


@pytest.mark.parametrize("aggregation", TOKEN_AGGREGATIONS)
@given(case=cases(), epsilon=st.floats(0.01, 0.9))
def test_gspo_tokens(aggregation: str, case: Case, epsilon: float) -> None:
    """The token form gives every token its own advantage and the ratio of its sequence."""
    expected = oracles.gspo(case, aggregation, "token", 1 - epsilon, 1 + epsilon)
    assert agrees(GSPO(epsilon, aggregation), case, expected)
    assert agrees(GSPO(aggregation=aggregation), case, oracles.gspo(case, aggregation))


@given(case=cases(), dual=st.floats(1.3, 4))
def test_dual_clip(case: Case, dual: float) -> None:
    """Above c a token of negative advantage has no gradient; the others are as before."""
    assert agrees(PPO(dual_clip=dual), case, oracles.grpo(case, "sum", dual=dual))
    assert agrees(GRPO(dual_clip=dual), case, oracles.grpo(case, dual=dual))


@given(case=cases(), lam=st.floats(0, 2))
def test_orpo(case: Case, lam: float) -> None:
    """ORPO's gradient is the NLL's and the odds ratio's."""
    assert agrees(ORPO(lam), case, oracles.orpo(case, lam))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPO(0.2), lambda case: oracles.dpo(case, 0.1)),
        (CrossEntropy("token_mean"), lambda case: oracles.cross_entropy(case, "sum")),
        (GRPO(kl=KL(beta=0.3)), lambda case: oracles.grpo(case)),
        (ORPO(0.2), lambda case: oracles.orpo(case, 0.1)),
        (SimPO(), lambda case: oracles.simpo(case, gamma=0.5)),
        (KTO(), lambda case: oracles.kto(case, beta=0.11)),
        (KTO(), lambda case: oracles.kto(case, zero=True)),
        (KTO(), lambda case: oracles.kto(case, desirable=1.1)),
        (CISPO(ClipRange(0.0, 1.05)), lambda case: oracles.cispo(case, high=5.0)),
        (DRO(), lambda case: oracles.dro(case, beta=0.5)),
        (GSPO(0.2), lambda case: oracles.gspo(case, form="sequence", low=0.8, high=1.2)),
    ],
)
def test_wrong_formula_is_noticed(loss: Loss, expected: Callable[[Case], list[list[float]]]) -> None:
    """Negative control: another beta, a missing mean, a dropped KL do not pass."""
    one = CaseSequence([-1.0, -2.0], [1.0, 1.0], [1.0, -1.0], [-1.1, -1.9], [-1.0, -2.0], [-1.5, -1.0])
    assert not agrees(loss, Case((one, one, one, one)), expected(Case((one, one, one, one))))


def test_dpo_at_the_reference() -> None:
    """At policy = reference the loss is log 2, the margin 0 and the slope beta / 2."""
    one = CaseSequence([-1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0])
    output, (chosen, rejected) = cotangent(DPO(0.3), Case((one, one)))
    assert math.isclose(output.loss.item(), math.log(2), rel_tol=1e-12)
    assert output.metrics["margin"].value == 0.0
    assert output.metrics["accuracy"].value == 0.5
    assert math.isclose(chosen.item(), -0.15, rel_tol=1e-12)
    assert math.isclose(rejected.item(), 0.15, rel_tol=1e-12)


@given(case=cases(junk=False))
def test_grpo_at_ratio_one_is_the_policy_gradient(case: Case) -> None:
    """Where policy and anchor are equal the gradient is that of -A logprob."""
    same = Case(
        tuple(
            CaseSequence(s.logprobs, s.weights, s.advantages, s.logprobs, s.logprobs, s.ref_logprobs)
            for s in case.sequences
        )
    )
    _, ours = cotangent(GRPO(), same)
    _, plain = cotangent(GRPO(clip=None, anchor="none"), same)
    assert torch.allclose(torch.cat(ours), torch.cat(plain), rtol=1e-12, atol=0)
