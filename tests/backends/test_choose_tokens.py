"""Tokens are chosen by inverting each row's own tempered, cut distribution function, whatever rows are beside it."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends import SamplingParams
from pullback.backends.sampling import RowParams, choose_tokens

VOCAB = 7
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=VOCAB, max_size=VOCAB, unique=True)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-300, 1e-30, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 1, 2, 4, 6, 7, 50]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.2, 1e-9]),
)
ROWS = st.lists(st.tuples(LOGITS, PARAMS, st.floats(0, 1, exclude_max=True)), min_size=1, max_size=6)


def probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """The definition, a token at a time: temper, keep the k most probable, then the smallest set with the mass."""
    best = max(logits)
    if params.temperature == 0:
        return [float(x == best) for x in logits]
    raw = [math.exp((x - best) / max(params.temperature, 1e-300)) for x in logits]
    order = sorted(range(VOCAB), key=lambda i: -logits[i])
    kept = order if params.top_k == -1 else order[: params.top_k]
    total, before, nucleus = sum(raw[i] for i in kept), 0.0, set[int]()
    for i in kept:
        if params.top_p == 1.0 or before < params.top_p:
            nucleus.add(i)
        before += raw[i] / total
    mass = sum(raw[i] for i in nucleus)
    return [raw[i] / mass if i in nucleus else 0.0 for i in range(VOCAB)]


def chosen(rows: list[tuple[list[float], SamplingParams, float]]) -> list[int]:
    logits = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    params = RowParams.of([row[1] for row in rows], logits)
    return choose_tokens(logits, params, [row[2] for row in rows]).tolist()


@given(rows=ROWS)
def test_each_row_is_drawn_from_its_own_distribution(rows: list[tuple[list[float], SamplingParams, float]]) -> None:
    """The number of a row lies in the chosen token's part of the unit interval; a token that was cut has none."""
    for (logits, params, uniform), token in zip(rows, chosen(rows), strict=True):
        shares = probabilities(logits, params)
        low = sum(shares[:token])
        assert shares[token] > 0
        if params.temperature > 0:
            assert low - 1e-9 <= uniform <= low + shares[token] + 1e-9


@given(rows=ROWS)
def test_rows_do_not_depend_on_each_other(rows: list[tuple[list[float], SamplingParams, float]]) -> None:
    """A row chooses the same alone, and in another order."""
    found = chosen(rows)
    assert found == [chosen([row])[0] for row in rows]
    assert found[::-1] == chosen(rows[::-1])


def test_the_largest_number_chooses_a_token_that_was_kept() -> None:
    """The last tokens of the vocabulary were cut: the number next to 1 must not reach them, in fp32 either."""
    logits = torch.tensor([[3.0, 2.0, 1.0] + [-40.0] * 5000])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(top_k=1, top_p=0.1)):
        rows = RowParams.of([params], logits)
        for uniform, allowed in ((math.nextafter(1.0, 0.0), {0, 1}), (0.0, {0})):
            assert int(choose_tokens(logits, rows, [uniform])) in allowed


def test_rare_tokens_keep_their_share() -> None:
    """Half of the mass lies in tokens whose own is below what an fp32 sum of the vocabulary could hold."""
    count = 1 << 21
    logits = torch.zeros(1, count + 1)
    logits[0, 0] = math.log(count)
    rows = RowParams.of([SamplingParams()], logits)
    for uniform in (0.25, 0.6, 0.75, 0.99):
        token = int(choose_tokens(logits, rows, [uniform]))
        expected = 0 if uniform < 0.5 else round((uniform - 0.5) * 2 * count)
        assert abs(token - expected) <= 8 * (uniform >= 0.5)
