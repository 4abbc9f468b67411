"""Corrections: weights and filters against plain loops, their bias by enumeration, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pullback.losses import GRPO, KL, PPO, Correction, Rejection, TokenBatch, TokenStream
from pullback.losses.functional import masked_weight, truncated_weight
from pullback.losses.parts.correction import Level
from pullback.testing import Case, CaseSequence, cotangent, oracles
from pullback.testing.strategies import cases

LEVELS: tuple[Level, ...] = ("token", "sequence", "geometric")
INF = math.inf


def decoupled(case: Case) -> Case:
    return replace(case, with_old=True)


def weights_of(correction: Correction, case: Case) -> list[list[float]]:
    """The weight of each trained token, 0 elsewhere."""
    batch, _ = decoupled(case).batch()
    flat = torch.where(batch.trained, correction.factor(batch), 0.0)
    return [row.tolist() for row in flat.split([len(s.weights) for s in case.sequences])]


def close(have: list[list[float]], want: list[list[float]]) -> bool:
    pairs = zip(itertools.chain(*have), itertools.chain(*want), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-14) for a, b in pairs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weight", ["truncate", "mask"])
@given(case=cases(), low=st.floats(0, 1), high=st.floats(1, 9))
def test_weights_are_plain_arithmetic(weight: Any, level: Any, case: Case, low: float, high: float) -> None:
    """Weights, and the gradients of PPO and GRPO with them, are those of scalar loops; the KL is not weighted."""
    correction = Correction(weight, level, low, high + 1e-6)
    case = decoupled(case)
    expected = oracles.correction(case, weight, level, low, high + 1e-6)
    assert close(weights_of(correction, case), expected)
    _, found = cotangent(PPO(correction=correction), case)
    assert close([g.tolist() for g in found], oracles.grpo(case, "sum", weights=expected))
    _, found = cotangent(GRPO(kl=KL(beta=0.3), correction=correction), case)
    assert close([g.tolist() for g in found], oracles.grpo(case, beta=0.3, weights=expected))


@given(case=cases())
def test_values_are_plain_arithmetic(case: Case) -> None:
    """The loss is the weighted sum of the tokens' clipped losses."""
    case = decoupled(case)
    total = 0.0
    for s, row in zip(case.sequences, oracles.correction(case, "truncate", "token", 0.0, 2.0), strict=True):
        for j in s.trained():
            r, a = math.exp(s.logprobs[j] - s.old_logprobs[j]), s.advantages[j]
            total += s.weights[j] * row[j] * max(-r * a, -min(max(r, 0.8), 1.2) * a)
    assert math.isclose(
        cotangent(PPO(correction=Correction.tis()), case)[0].loss.item(), total, rel_tol=1e-12, abs_tol=1e-12
    )


STATISTICS: dict[str, Callable[[float], float]] = {
    "ratio": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(d) - 1 - d,
}


def rejected(rejection: Rejection, case: Case) -> list[list[float]]:
    """1 for each trained token that a filter keeps, in plain loops."""
    low, high = rejection.low, rejection.high
    if rejection.statistic == "ratio":
        low, high = math.log(low) if low else -INF, math.log(high)

    def kept(s: CaseSequence, j: int) -> bool:
        values = [STATISTICS[rejection.statistic](s.old_logprobs[k] - s.rollout_logprobs[k]) for k in s.trained()]
        at = s.trained().index(j)
        found = {
            "token": [values[at]],
            "sum": [math.fsum(values)],
            "mean": [math.fsum(values) / len(values)],
            "worst": values,
        }
        return all(low <= x <= high for x in found[rejection.level])

    return [[float(bool(w) and kept(s, j)) for j, w in enumerate(s.weights)] for s in case.sequences]


@pytest.mark.parametrize("level", ["token", "sum", "mean", "worst"])
@pytest.mark.parametrize("statistic", STATISTICS)
@given(case=cases(), low=st.floats(0, 0.9), high=st.floats(1.1, 9))
def test_rejection_is_plain_arithmetic(statistic: Any, level: Any, case: Case, low: float, high: float) -> None:
    """A filter keeps what scalar loops keep, several keep what all of them keep, and a weight is kept or 0."""
    one = Rejection(statistic, level, low if statistic == "ratio" else 0.0, high)
    other = Rejection("ratio", "worst", 0.1, 30.0)
    expected, also = rejected(one, case), rejected(other, case)
    both = [[a * b for a, b in zip(*rows, strict=True)] for rows in zip(expected, also, strict=True)]
    assert close(weights_of(Correction.rejection(one), case), expected)
    assert close(weights_of(Correction.rejection(one, other), case), both)
    weighted = oracles.correction(decoupled(case), "truncate", "token", 0.0, 1.05)
    product = [[a * b for a, b in zip(*rows, strict=True)] for rows in zip(weighted, expected, strict=True)]
    assert close(weights_of(Correction.tis(1.05, reject=one), case), product)


@given(case=cases(junk=False))
def test_on_policy_nothing_changes(case: Case) -> None:
    """Where old and sampler agree every correction is the loss without one, to the last bit."""
    same = replace(
        case, with_old=True, sequences=tuple(replace(s, old_logprobs=s.rollout_logprobs) for s in case.sequences)
    )
    plain = cotangent(PPO(), same)
    for correction in (*map(lambda level: Correction.tis(level=level), LEVELS), Correction.icepop()):
        output, found = cotangent(PPO(correction=correction), same)
        assert output.loss.item() == plain[0].loss.item()
        assert torch.equal(torch.cat(found), torch.cat(plain[1]))
    filtered = cotangent(PPO(correction=Correction.geometric()), same)
    assert torch.equal(torch.cat(filtered[1]), torch.cat(plain[1]))


@given(d=st.lists(st.floats(-3, 3), min_size=1, max_size=12))
def test_levels(d: list[float]) -> None:
    """The product of one token is that token's ratio, and the geometric mean is the n-th root of the product."""
    zeros = [0.0] * len(d)
    old = torch.tensor(d, dtype=torch.float64)
    batch = TokenBatch.from_packed(
        torch.tensor(zeros, dtype=torch.float64), [len(d)], old_logprobs=old, rollout_logprobs=torch.zeros_like(old)
    )
    token, product, mean = (Correction.tis(INF, level=level).factor(batch) for level in LEVELS)
    assert torch.allclose(token, old.exp(), rtol=1e-14)
    assert torch.allclose(product, mean ** len(d), rtol=1e-11)
    single = TokenBatch.from_packed(
        torch.zeros(len(d), dtype=torch.float64), [1] * len(d), old_logprobs=old, rollout_logprobs=torch.zeros_like(old)
    )
    for level in LEVELS:
        assert torch.equal(Correction.tis(level=level).factor(single), Correction.tis().factor(batch))


def test_bounds_are_exact() -> None:
    """A truncated weight is the bound itself; a masked one is kept on both bounds and gone next to them."""
    step = 2.0**-52
    at = torch.tensor([-1e4, 0.0, step, 1e4], dtype=torch.float64)
    assert truncated_weight(at, 0.25, 1.0).tolist() == [0.25, 1.0, 1.0, 1.0]
    assert masked_weight(at, 0.0, 1.0).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert masked_weight(at, 1.0, 1 + step).tolist() == [0.0, 1.0, 1 + step, 0.0]
    assert masked_weight(torch.tensor([INF, -INF, math.log(2.0)]), 0.5, 5.0).tolist() == pytest.approx([0.0, 0.0, 2.0])
    for weight in (truncated_weight, masked_weight):
        assert not weight(at.clone().requires_grad_(), 0.0, INF).requires_grad
    assert bool(truncated_weight(at.float(), 0.0, INF).isfinite().all())


@given(d=st.floats(-60, 60))
@example(d=20.0)
@example(d=21.5)
def test_weights_without_a_bound_are_ratios(d: float) -> None:
    """They go on by the tangent of exp above 20, as every ratio does, and do not stop there."""
    want = math.exp(d) if d <= 20 else math.exp(20) * (1 + d - 20)
    for weight in (truncated_weight, masked_weight):
        assert weight(torch.tensor(d, dtype=torch.float64), 0.0, INF).item() == pytest.approx(want, rel=1e-12)


@given(case=cases(), normalize=st.sampled_from(["tokens", "sequences"]), high=st.floats(1, 4))
def test_self_normalised_weights_have_mean_one(case: Case, normalize: Any, high: float) -> None:
    """Over the declared population, whatever the lengths; masked to nothing they stay 0."""
    correction = Correction.tis(high, level="sequence", normalize=normalize)
    rows = weights_of(correction, case)
    trained = [[rows[i][j] for j in s.trained()] for i, s in enumerate(case.sequences)]
    flat = list(itertools.chain(*trained)) if normalize == "tokens" else [row[0] for row in trained]
    assert math.isclose(math.fsum(flat) / len(flat), 1.0, rel_tol=1e-12)
    plain = weights_of(Correction.tis(high, level="sequence"), case)
    scale = rows[0][case.sequences[0].trained()[0]] / plain[0][case.sequences[0].trained()[0]]
    assert close(rows, [[x * scale for x in row] for row in plain])
    lengths = [len(s.weights) for s in case.sequences]
    apart = zip(case.sequences, lengths, strict=True)
    far = replace(
        case, sequences=tuple(replace(s, old_logprobs=[0.0] * n, rollout_logprobs=[-9.0] * n) for s, n in apart)
    )
    assert set(itertools.chain(*weights_of(Correction.masked(0.5, 5.0, normalize="tokens"), far))) == {0.0}


@given(case=cases())
def test_counts_are_those_without(case: Case) -> None:
    """Masks and filters leave every denominator as it is."""
    case = decoupled(case)
    strict = Correction.masked(0.9, 1.1, reject=Rejection("k3", "mean", high=1e-3))
    for aggregation in ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "weighted_mean"):
        loss, plain = GRPO(aggregation=aggregation, correction=strict), GRPO(aggregation=aggregation)
        assert cotangent(loss, case)[0].parts[0].count == cotangent(plain, case)[0].parts[0].count


@given(case=cases())
def test_streamed(case: Case) -> None:
    """Weights of tokens, chunk by chunk, are those of the whole batch."""
    case = decoupled(case)
    loss = PPO(correction=Correction.icepop())
    batch, leaf = case.batch()
    output, found = cotangent(loss, case)
    stream = TokenStream(loss, batch.with_logprobs(torch.zeros_like(leaf.detach())))
    chunks = [stream.cotangent(leaf.detach()[at], at) for at in (slice(0, 1), slice(1, len(leaf)))]
    assert torch.allclose(torch.cat(chunks), torch.cat(found), rtol=1e-12, atol=0)
    assert math.isclose(stream.output().loss.item(), output.loss.item(), rel_tol=1e-12, abs_tol=1e-12)


def test_metrics() -> None:
    """Mean, largest and squared weight, and the fractions that were truncated or rejected, over the trained tokens."""
    low = torch.full((5,), -2.0, dtype=torch.float64)
    old = low + torch.tensor([3.0, 0.6, 1.0, 4.5, 7.0], dtype=torch.float64).log()
    weights, zero = torch.tensor([1.0, 1, 1, 1, 0]), torch.zeros(5, dtype=torch.float64)
    batch = TokenBatch.from_packed(
        low, [3, 2], weights=weights, advantages=zero, old_logprobs=old, rollout_logprobs=low
    )
    found = PPO(correction=Correction.tis(reject=Rejection("ratio", "worst", high=4.0))).evaluate(batch).metrics
    values = {name: metric.value for name, metric in found.items()}
    assert math.isclose(values["correction"], (2.0 + 0.6 + 1.0) / 4)
    assert math.isclose(values["correction_squared"], (4.0 + 0.36 + 1.0) / 4)
    assert values["correction_largest"] == pytest.approx(2.0)
    assert values["correction_truncated"] == 0.5
    assert values["rejected_tokens"] == 0.25
    assert values["rejected_sequences"] == 0.5
    masked = PPO(dual_clip=3.0, correction=Correction.icepop()).evaluate(batch).metrics
    assert masked["correction_masked"].value == 0.0
    assert masked["dual_clip_fraction"].value == 0.0
