"""The metrics of ratios beside plain loops: junk where nothing is trained, one advantage per token or per sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reads import pretend_device

from pullback.losses import KL, ClipRange, TokenBatch
from pullback.losses.evaluation.metrics import DeferredMetric, read
from pullback.losses.functional.numerics import EXPONENT_LIMIT
from pullback.losses.parts import ratio as ratio_part
from pullback.losses.parts.ratio import importance_ratio, ratio_metrics

Token = tuple[float, float, float]  # weight, log-ratio, advantage
WEIGHTS = st.sampled_from([0.0, 1.0, 0.5, 2.0])
TOKENS = st.tuples(WEIGHTS, st.floats(-1.0, 1.0) | st.floats(-30.0, 30.0), st.sampled_from([-1.5, 0.0, 2.0]))
CLIPS = [ClipRange(0.8, 1.2), ClipRange(0.0, 1.28), ClipRange(0.5, math.inf)]
JUNK = [math.nan, math.inf, -math.inf, 1e30]


def ratio(d: float) -> float:
    return math.exp(min(d, EXPONENT_LIMIT)) * (1.0 + max(d - EXPONENT_LIMIT, 0.0))


def k3(d: float) -> float:
    tail = math.exp(EXPONENT_LIMIT) * max(-d - EXPONENT_LIMIT, 0.0)
    return math.expm1(min(-d, EXPONENT_LIMIT)) + tail + d


def plain(tokens: list[Token], clip: ClipRange, dual: float | None) -> dict[str, float]:
    """The same metrics, a token at a time."""
    kept = [(d, a) for w, d, a in tokens if w]
    found = {
        "ratio": sum(ratio(d) for d, _ in kept) / len(kept),
        "ratio_largest": max(ratio(d) for d, _ in kept),
        "ratio_squared": sum(ratio(d) ** 2 for d, _ in kept) / len(kept),
        "ratio_saturated": float(sum(d > EXPONENT_LIMIT for d, _ in kept)),
        "kl_anchor": sum(k3(d) for d, _ in kept) / len(kept),
        "advantage": sum(a for _, a in kept) / len(kept),
        "advantage_abs": sum(abs(a) for _, a in kept) / len(kept),
        "clip_fraction": sum(_clipped(ratio(d), a, clip) for d, a in kept) / len(kept),
    }
    if dual is not None:
        found["dual_clip_fraction"] = sum(ratio(d) > dual and a < 0 for d, a in kept) / len(kept)
    return found


def _clipped(r: float, advantage: float, clip: ClipRange) -> bool:
    return (r > clip.high and advantage > 0) or (r < clip.low and advantage < 0)


def batches(tokens: list[Token], junk: float) -> Iterator[TokenBatch]:
    """Yield the tokens as one packed sequence and as padded ones of a token each, with junk where nothing is trained."""
    w, d, a = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    x = torch.where(w != 0, -1.0, junk).to(torch.float64)
    rollout = torch.where(w != 0, -1.0 - d, junk)
    yield TokenBatch.from_packed(x, [len(tokens)], weights=w, rollout_logprobs=rollout, advantages=a)
    column = {"rollout_logprobs": rollout[:, None], "advantages": a}
    yield TokenBatch.from_padded(x[:, None], w[:, None], **column)


@pytest.mark.parametrize("device", [False, True])
@given(
    tokens=st.lists(TOKENS, min_size=1, max_size=12),
    clip=st.sampled_from(CLIPS),
    dual=st.sampled_from([None, 3.0]),
    junk=st.sampled_from(JUNK),
)
def test_plain_loops(device: bool, tokens: list[Token], clip: ClipRange, dual: float | None, junk: float) -> None:
    """Every metric is that of the loops, to 1e-12, on the CPU's own ways and on those of a device."""
    tokens = [*tokens, (1.0, 0.3, 1.0)]
    expected = plain(tokens, clip, dual)
    with pytest.MonkeyPatch.context() as patch:
        if device:
            pretend_device(patch)
        for batch in batches(tokens, junk):
            found = read(ratio_metrics(batch, clip, dual))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert math.isclose(found[name].value, value, rel_tol=1e-12, abs_tol=1e-12), name


@given(steps=st.lists(st.floats(-40.0, 40.0), min_size=1, max_size=6))
@example(steps=[19.0, 20.0, 25.0])
def test_importance_ratios(steps: list[float]) -> None:
    """The ratio to whoever drew the token, with the tangent beyond the limit: a constant, whoever requires a gradient."""
    tokens = [(1.0, step, 1.0) for step in steps]
    for batch in batches(tokens, math.nan):
        given = batch.with_logprobs(batch.logprobs.clone().requires_grad_())
        found = importance_ratio(given, given.given("rollout_logprobs"))
        assert found.flatten().tolist() == pytest.approx([ratio(-1.0 - (-1.0 - step)) for step in steps], rel=1e-12)
        assert not found.requires_grad


def test_metrics_have_no_graph() -> None:
    """They are those of detached log-probs, also when these are asked for in the middle of a loss."""
    tokens = [(1.0, 0.3, -1.0), (0.0, 0.3, -1.0), (2.0, -0.7, 2.0)]
    for batch in batches(tokens, math.nan):
        detached = replace(batch, ref_logprobs=batch.rollout_logprobs)
        leaf = replace(detached, logprobs=batch.logprobs.clone().requires_grad_())

        def metrics(of: TokenBatch) -> dict[str, DeferredMetric]:
            return {**ratio_metrics(of, CLIPS[0], 3.0), "kl_ref": KL().metric(of)}

        found, want = read(metrics(leaf)), read(metrics(detached))
        assert found == want


def test_untrained_tokens_that_count_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: where what is kept is forgotten, an untrained token counts as clipped."""
    tokens: list[Token] = [(0.0, 0.3, -1.0), (1.0, 0.0, -1.0)]
    _, padded = batches(tokens, math.nan)
    assert read(ratio_metrics(padded, CLIPS[0]))["clip_fraction"].value == 0.0
    monkeypatch.setattr(ratio_part, "_kept_above", lambda kept, values, limit: (values > limit).double())
    assert read(ratio_metrics(padded, CLIPS[0]))["clip_fraction"].value == 1.0
