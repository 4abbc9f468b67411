"""Random cases beside plain loops in fp64: the value, and the gradient number by number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from oracles import value_oracles as values
from tiers import SOAK

from pullback.losses import DPO, GRPO, KL, ORPO, PPO, CrossEntropy, ImportanceSampling, Loss, fixed_length
from pullback.testing import Case, CaseSequence, oracles

CASES = 20_000 if SOAK else 300
AGGREGATIONS = (
    "sum",
    "token_mean",
    "weighted_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "group_mean_token_mean",
)
Cotangent = list[list[float]]
Drawn = tuple[Loss, Callable[[Case], Cotangent], Callable[[Case], list[float]]]


def sequence(rng: random.Random) -> CaseSequence:
    """Draw one to seven tokens, of which at least one is trained; junk elsewhere."""
    n = rng.randint(1, 7)
    weights = [rng.choice([0.0, 1.0, 1.0, 0.5, 2.0]) for _ in range(n)]
    weights[rng.randrange(n)] = 1.0

    def numbers(low: float, high: float) -> list[float]:
        return [rng.uniform(low, high) if w else rng.choice([math.nan, math.inf, -math.inf, 1e30]) for w in weights]

    logprobs = numbers(-4.0, -0.05)
    near = [[x + rng.gauss(0.0, 0.4) for x in logprobs] for _ in range(3)]
    clamped = [[min(x, -1e-3) if math.isfinite(x) else x for x in each] for each in near]
    rollout, old, ref = clamped
    return CaseSequence(logprobs, weights, numbers(-2.0, 2.0), rollout, old, ref, rng.randint(0, 2))


def draw(rng: random.Random) -> Drawn:
    """Draw a loss, the oracle of its gradient and that of the summands of its value."""
    aggregation = rng.choice(AGGREGATIONS)
    beta = rng.uniform(0.01, 2.0)
    match rng.randrange(7):
        case 0:
            return (
                CrossEntropy(aggregation),
                lambda case: oracles.cross_entropy(case, aggregation),
                lambda case: values.cross_entropy(case, aggregation),
            )
        case 1:
            length = rng.uniform(1.0, 100.0)
            return (
                CrossEntropy(fixed_length(length)),
                lambda case: oracles.cross_entropy(case, "fixed_length", length),
                lambda case: values.cross_entropy(case, "fixed_length", length),
            )
        case 2:
            return (
                ImportanceSampling(aggregation),
                lambda case: oracles.grpo(case, aggregation, None),
                lambda case: values.grpo(case, aggregation, (0.0, math.inf)),
            )
        case 3:
            return (
                PPO(0.2, aggregation),
                lambda case: oracles.grpo(case, aggregation),
                lambda case: values.grpo(case, aggregation),
            )
        case 4:
            kind, importance = rng.choice(["k2", "k3"]), rng.choice([True, False])
            kl = KL(kind, beta, "pathwise", importance)  # type: ignore[arg-type]
            return (
                GRPO(kl=kl, aggregation=aggregation),
                lambda case: oracles.grpo(case, aggregation, beta=beta, kl=kind, importance=importance),
                lambda case: values.grpo(case, aggregation, beta=beta, kl=kind, importance=importance),
            )
        case 5:
            smoothing = rng.uniform(0.0, 0.49)
            return (
                DPO(beta, smoothing),
                lambda case: oracles.dpo(case, beta, smoothing),
                lambda case: values.dpo(case, beta, smoothing),
            )
        case _:
            return ORPO(beta), lambda case: oracles.orpo(case, beta), lambda case: values.orpo(case, beta)


def distance(loss: Loss, case: Case, expected: Cotangent, summands: list[float], *, padded: bool) -> float:
    """Relative distance of a loss's gradient from the expected one, or of its value from the sum, whichever is larger."""
    if padded:
        batch, leaves = case.padded(left=len(case.sequences) == 4)
    else:
        batch, leaf = case.batch()
        leaves = [leaf]
    value = loss.evaluate(batch).loss
    found = torch.cat(torch.autograd.grad(value, leaves))
    want = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
    off = abs(float(value.detach()) - math.fsum(summands)) / max(1.0, math.fsum(map(abs, summands)))
    return max(off, float((found - want).norm()) / max(1.0, float(want.norm())))


def worst(cases: int, seed: int, spoil: float = 1.0, spoil_value: float = 1.0) -> float:
    """Return the largest distance over random cases; ``spoil`` scales the expected gradient, ``spoil_value`` the value."""
    rng, largest = random.Random(seed), 0.0
    for _ in range(cases):
        loss, oracle, value = draw(rng)
        case = Case(tuple(sequence(rng) for _ in range(rng.choice([2, 4, 6]))), with_old=rng.random() < 0.5)
        expected = [[x * spoil for x in row] for row in oracle(case)]
        summands = [x * spoil_value for x in value(case)]
        largest = max(largest, distance(loss, case, expected, summands, padded=rng.random() < 0.5))
    return largest


def test_random_cases() -> None:
    """Every value and gradient equals its loops to 1e-12; `make soak` draws 20,000 cases."""
    assert worst(CASES, seed=0) <= 1e-12


@pytest.mark.parametrize("spoilt", ["spoil", "spoil_value"])
def test_a_small_error_is_noticed(spoilt: str) -> None:
    """Negative control: a part in a million is seen, in the gradient and in the value."""
    assert worst(10, seed=1) <= 1e-12
    assert worst(10, seed=1, **{spoilt: 1.0 + 1e-6}) > 1e-12
