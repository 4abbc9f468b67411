"""What losses log is what plain loops over the trained tokens find, whatever lies at the others and in the padding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import plain_metrics
from oracles.plain_metrics import average
from torch import Tensor

from pullback.losses import (
    CISPO,
    DPO,
    DRO,
    GRPO,
    GSPO,
    KL,
    ORPO,
    PPO,
    ClipRange,
    Correction,
    CrossEntropy,
    ImportanceSampling,
    Loss,
    Rejection,
    SimPO,
    TokenBatch,
)
from pullback.losses.evaluation.metrics import Metric
from pullback.testing import Case, CaseSequence, cotangent, oracles
from pullback.testing.strategies import cases

CLIPPED = [PPO(0.2, dual_clip=3.0), GRPO(0.2, kl=KL(), dual_clip=3.0)]
LEVELS = st.sampled_from(["token", "sequence", "geometric"])


NAN = math.nan
# Drifted to both sides and far, weights other than 1, nothing trained in one sequence, and what must not be looked at.
RICH = Case(
    (
        CaseSequence(
            [-1.0, -2.0, NAN],
            [0.5, 2.0, 0.0],
            [1.0, -1.5, NAN],
            [-3.0, -1.5, NAN],
            [-4.0, -1.0, NAN],
            [-1.2, -2.5, 7.0],
        ),
        CaseSequence(
            [-4.0, -0.5, -1.0],
            [2.0, 0.0, 0.5],
            [-1.0, 9.0, 2.0],
            [-1.0, -9.0, -1.1],
            [-1.5, NAN, -1.0],
            [-3.0, NAN, -9.0],
        ),
        CaseSequence([-1.0], [0.0], [NAN], [NAN], [NAN], [NAN], 1),
        CaseSequence([-0.5, -33.0], [1.0, 1.0], [-0.7, 0.4], [-30.0, -1.0], [-31.0, -8.0], [-40.0, -0.3], 1),
    )
)


def token(log_ratio: float, advantage: float) -> CaseSequence:
    """One trained token."""
    return CaseSequence([log_ratio - 50.0], [1.0], [advantage], [-50.0], [-50.0], [-50.0])


def close(have: Mapping[str, Metric], want: Mapping[str, float]) -> None:
    """Compare the metrics that are expected, to 1e-11."""
    found = {name: have[name].value for name in want}
    assert found == pytest.approx(dict(want), rel=1e-11, abs=1e-12, nan_ok=True)


def metrics_of(loss: Loss, case: Case) -> Mapping[str, Metric]:
    return cotangent(loss, case)[0].metrics


@pytest.mark.parametrize("loss", CLIPPED, ids=["ppo", "grpo"])
@given(case=cases(empty=True) | cases(low=-60.0))
@example(case=RICH)
@example(case=replace(RICH, with_old=True))
def test_ratios_and_clipping(loss: Loss, case: Case) -> None:
    """Ratios, their divergences, advantages and the shares that are clipped, packed and padded."""
    want = plain_metrics.of_ratios(case, 0.8, 1.2, 3.0)
    if isinstance(loss, PPO):
        del want["kl_ref"]
    close(metrics_of(loss, case), want)
    close(loss.evaluate(case.padded(left=True)[0]).metrics, want)


@pytest.mark.parametrize("loss", [CISPO(ClipRange(0.5, 2.0)), DRO(), ImportanceSampling()], ids=lambda loss: loss.name)
@given(case=cases())
@example(case=RICH)
def test_ratios_of_the_other_losses(loss: Loss, case: Case) -> None:
    """The same ratios; a share that is clipped where the loss has a range, and none where it has none."""
    want = plain_metrics.of_ratios(case, 0.5, 2.0, math.inf)
    del want["dual_clip_fraction"], want["kl_ref"]
    metrics = metrics_of(loss, case)
    if loss.name != "cispo":
        assert not {"clip_fraction", "dual_clip_fraction"} & metrics.keys()
        del want["clip_fraction"]
    close(metrics, want)


def test_a_bound_itself_is_not_clipped() -> None:
    """A ratio on an edge of the range, and a token without an advantage, are not counted; the next number is."""
    up, down = math.log(1.5), -math.log(1.5)
    on_edge = [token(0.0, 1.0), token(0.0, -1.0), token(up, 0.0), token(down, 0.0), token(up, -1.0), token(down, 1.0)]
    close(metrics_of(PPO(ClipRange(1.0, 1.0)), Case(tuple(on_edge))), {"clip_fraction": 0.0})
    beyond = [token(up, 1.0), token(down, -1.0), *on_edge]
    close(metrics_of(PPO(ClipRange(1.0, 1.0)), Case(tuple(beyond))), {"clip_fraction": 0.25})
    saturated = Case((token(20.0, 1.0), token(20.5, 1.0), token(-20.5, 1.0)))
    close(metrics_of(ImportanceSampling(), saturated), {"ratio_saturated": 1.0, "advantage": 1.0})


@given(case=cases(empty=True), advantages=st.lists(st.floats(-2, 2), min_size=6, max_size=6))
@example(case=RICH, advantages=[1.0, -2.0, NAN, -0.3])
def test_one_advantage_per_sequence(case: Case, advantages: list[float]) -> None:
    """An advantage for each row is logged as one for each of its trained tokens."""
    rows = zip(case.sequences, advantages, strict=False)
    spread = [replace(s, advantages=[a] * len(s.weights)) for s, a in rows]
    want = plain_metrics.of_ratios(replace(case, sequences=tuple(spread)), 0.8, 1.2, 3.0)
    del want["kl_ref"]
    padded, _ = case.padded()
    inputs = {name: getattr(padded, name) for name in ("rollout_logprobs", "old_logprobs")}
    per_row = torch.tensor(advantages[: len(case.sequences)], dtype=torch.float64)
    assert padded.weights is not None
    batch = TokenBatch.from_padded(padded.logprobs, padded.weights, advantages=per_row, **inputs)
    close(CLIPPED[0].evaluate(batch).metrics, want)


def candidates(case: Case, weights: tuple[float, float], advantages: Tensor | None) -> TokenBatch:
    """Two candidates for each token, the same but for their weights; with advantages for the rows, or those of the case."""
    padded, _ = case.padded()
    assert padded.weights is not None
    assert padded.rollout_logprobs is not None
    assert padded.advantages is not None
    given = torch.stack([padded.advantages] * 2, -1) if advantages is None else advantages
    return TokenBatch.from_padded(
        torch.stack([padded.logprobs] * 2, -1),
        torch.stack([w * padded.weights for w in weights], -1),
        rollout_logprobs=torch.stack([padded.rollout_logprobs] * 2, -1),
        advantages=given,
    )


@given(case=cases(), rows=st.lists(st.floats(-2, 2), min_size=6, max_size=6), by_row=st.booleans())
def test_candidates_are_tokens(case: Case, rows: list[float], by_row: bool) -> None:
    """Each trained candidate counts, with an advantage of its own or of its row."""
    spread = [replace(s, advantages=[a] * len(s.weights)) for s, a in zip(case.sequences, rows, strict=False)]
    case = replace(case, with_old=False, sequences=tuple(spread) if by_row else case.sequences)
    per_row = torch.tensor(rows[: len(case.sequences)], dtype=torch.float64) if by_row else None
    want = plain_metrics.of_ratios(case, 0.8, 1.2, math.inf)
    del want["kl_ref"], want["dual_clip_fraction"], want["ratio_saturated"]
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        close(PPO().evaluate(candidates(case, weights, per_row)).metrics, want)


@given(case=cases(), epsilon=st.floats(0.01, 0.9), dual=st.none() | st.floats(2, 5))
@example(case=RICH, epsilon=0.2, dual=None)
@example(case=Case((token(30.0, 1.0), token(25.0, -1.0))), epsilon=0.2, dual=3.0)
def test_sequence_ratios(case: Case, epsilon: float, dual: float | None) -> None:
    """One ratio per sequence, clipped by the mean advantage of its trained tokens."""
    found = metrics_of(GSPO(epsilon, dual_clip=dual), case)
    assert ("dual_clip_fraction" in found) == (dual is not None)
    close(found, plain_metrics.of_sequence_ratios(case, 1 - epsilon, 1 + epsilon, dual))


def test_sequence_ratios_on_their_bounds() -> None:
    """A ratio on an edge, a sequence without advantage and one that is not trained are not clipped."""
    still = [token(0.0, 1.0), token(0.0, -1.0), token(1.0, 0.0), token(-1.0, 0.0)]
    untrained = replace(token(1.0, 1.0), weights=[0.0])
    found = metrics_of(GSPO(ClipRange(1.0, 1.0)), Case((*still, untrained)))
    close(found, {"clip_fraction": 0.0, "sequence_ratio": average([1.0, 1.0, math.e, 1 / math.e])})
    found = metrics_of(GSPO(ClipRange(1.0, 1.0)), Case((*still, token(1.0, 1.0), token(-1.0, -1.0), token(1.0, -1.0))))
    close(found, {"clip_fraction": 2 / 7})


@given(case=cases(empty=True), level=LEVELS, weight=st.sampled_from(["truncate", "mask"]), high=st.floats(1.1, 4))
@example(case=RICH, level="token", weight="truncate", high=1.1)
@example(case=RICH, level="sequence", weight="mask", high=1.1)
@example(case=RICH, level="geometric", weight="truncate", high=1.1)
@example(
    case=Case((token(0.0, 1.0), replace(token(0.0, 1.0), old_logprobs=[-28.0]))), level="token", weight="mask", high=1e9
)
def test_corrections(case: Case, level: Any, weight: Any, high: float) -> None:
    """Weights of a correction, and the share of tokens whose ratio is out of its range."""
    case = replace(case, with_old=True)
    want = plain_metrics.of_weights(case, oracles.correction(case, weight, level, 0.5, high), level, 0.5, high)
    want["correction_truncated" if weight == "truncate" else "correction_masked"] = want.pop("outside")
    close(metrics_of(PPO(correction=Correction(weight, level, 0.5, high)), case), want)


def test_bounds_of_a_correction_are_inside() -> None:
    """A ratio on a bound is not out of the range, and a filter alone has no range."""
    ones = Case(tuple(replace(token(0.0, 1.0), old_logprobs=[-50.0]) for _ in range(2)), with_old=True)
    found = metrics_of(PPO(correction=Correction("mask", "token", 1.0, 1.0)), ones)
    close(found, {"correction_masked": 0.0, "correction": 1.0})
    alone = metrics_of(PPO(correction=Correction.geometric()), ones)
    assert not {"correction_masked", "correction_truncated"} & alone.keys()
    assert not {"rejected_tokens", "rejected_sequences"} & found.keys()
    close(alone, {"rejected_tokens": 0.0, "rejected_sequences": 0.0})


@given(case=cases(empty=True), high=st.floats(1.1, 4))
@example(case=RICH, high=1.1)
@example(case=RICH.subset([2, 3]), high=1e9)
def test_rejections(case: Case, high: float) -> None:
    """The shares of the trained tokens that are dropped, and of the trained sequences of which no token is left."""
    case, dropped, gone = replace(case, with_old=True), [], []
    for s in case.sequences:
        out = [math.exp(s.old_logprobs[j] - s.rollout_logprobs[j]) > high for j in s.trained()]
        dropped += out
        gone += [all(out)] if out else []
    found = metrics_of(PPO(correction=Correction.rejection(Rejection("ratio", "token", high=high))), case)
    close(found, {"rejected_tokens": average(dropped), "rejected_sequences": average(gone)})


def mean_logprob(s: CaseSequence) -> float:
    return math.fsum(s.weights[j] * s.logprobs[j] for j in s.trained()) / math.fsum(s.weights)


def log_odds(x: float, top: float) -> float:
    inside = min(x, math.log(top))
    return inside - math.log(-math.expm1(inside)) + (x - inside) / (1.0 - top)


@given(case=cases())
@example(case=RICH.subset([0, 1, 3, 0]))
def test_pairs(case: Case) -> None:
    """Margins, rewards and accuracies of preference losses; what is equal counts as half right."""
    sums = [math.fsum(s.weights[j] * (s.logprobs[j] - s.ref_logprobs[j]) for j in s.trained()) for s in case.sequences]
    rewards = [0.3 * h for h in sums]
    want = plain_metrics.of_pairs(rewards[::2], rewards[1::2])
    want |= {"reward_chosen": average(rewards[::2]), "reward_rejected": average(rewards[1::2])}
    close(metrics_of(DPO(0.3), case), want)
    means = [mean_logprob(s) for s in case.sequences]
    close(
        metrics_of(SimPO(2.0, 0.7), case),
        plain_metrics.of_pairs([2 * m - 0.7 for m in means[::2]], [2 * m for m in means[1::2]]),
    )
    odds = [log_odds(m, 0.2) for m in means]
    want = plain_metrics.of_pairs(odds[::2], odds[1::2])
    want |= {"nll_chosen": -average(means[::2]), "nll_rejected": -average(means[1::2])}
    want["odds_capped"] = float(sum(math.exp(m) > 0.2 for m in means))
    close(metrics_of(ORPO(max_prob=0.2), case), want)


def test_the_bound_of_the_odds_is_not_capped() -> None:
    """A response is counted where its probability is above the bound, not on it; the likelihood is the first term."""
    at = torch.tensor([[-1.0], [-1.5], [-0.9], [-1.0]], dtype=torch.float64)
    output = ORPO(max_prob=at[0].exp().item()).evaluate(TokenBatch.from_padded(at, torch.ones(4, 1)))
    close(output.metrics, {"odds_capped": 1.0})
    assert [part.name for part in output.parts] == list(output.values) == ["nll", "odds"]


def test_equal_pairs_are_half_right() -> None:
    """At policy = reference no margin says which response is better."""
    equal, better, worse = token(0.0, 0.0), token(1.0, 0.0), token(-1.0, 0.0)
    found = metrics_of(DPO(), Case((equal, equal, better, equal, worse, equal, better, worse)))
    close(found, {"accuracy": 2.5 / 4, "margin": 0.1 * (1 - 1 + 2) / 4})


@given(case=cases(empty=True))
@example(case=RICH)
def test_likelihood(case: Case) -> None:
    """The negative log-likelihood per weight."""
    pairs = [(s.weights[j], s.logprobs[j]) for s in case.sequences for j in s.trained()]
    weight = math.fsum(w for w, _ in pairs)
    close(
        metrics_of(CrossEntropy(), case), {"nll": -math.fsum(w * x for w, x in pairs) / weight if weight else math.nan}
    )


def test_wrong_metrics_are_noticed() -> None:
    """Negative control: a mean over all tokens instead of the trained ones is another number."""
    s = CaseSequence([-1.0, -1.0], [1.0, 0.0], [1.0, 1.0], [-2.0, -2.0], [-2.0, -2.0], [-2.0, -2.0])
    found = metrics_of(PPO(), Case((s,)))
    close(found, {"ratio": math.e})
    with pytest.raises(AssertionError):
        close(found, {"ratio": math.e / 2})
