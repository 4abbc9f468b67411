"""What trainers hold in place of weights and neighbouring pairs: labels, stacked pairs, and sums of the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pullback.errors import (
    ConfigError,
    DatumError,
    EmptyUnitError,
    IncompleteUnitError,
    InvalidDatumsError,
    LengthError,
    MissingFieldError,
)
from pullback.losses import DPO, GRPO, KL, ORPO, CrossEntropy, Loss, SimPO, TokenBatch, get_loss, loss_names
from pullback.losses.batch.values import LARGEST_LOGPROB
from pullback.losses.preference.pairs import wrong_reference_sums

PAIR_LOSSES = (DPO(0.3), ORPO(), SimPO())


@st.composite
def padded(draw: st.DrawFn) -> dict[str, Tensor]:
    """Log-probs of pairs, fp64, with weights that leave every response a token."""
    pairs, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    weights = torch.where(uniform(2 * pairs, length) < 0.5, 0.0, 0.5 + uniform(2 * pairs, length))
    weights[:, draw(st.integers(0, length - 1))] = 1.0
    return {
        "logprobs": -3 * uniform(2 * pairs, length),
        "weights": weights,
        "ref_logprobs": -3 * uniform(2 * pairs, length),
    }


def value_and_slope(loss: Loss, logprobs: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    leaf = logprobs.clone().requires_grad_()
    value = loss.evaluate(TokenBatch.from_padded(leaf, **inputs)).loss
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@given(padded(), st.sampled_from(PAIR_LOSSES))
def test_the_order_of_pairs_has_no_effect(batch: dict[str, Tensor], loss: Loss) -> None:
    """Stacked pairs have the value and the slopes of interleaved ones, and neighbours are interleaved."""
    rows = len(batch["logprobs"])
    order = torch.cat([torch.arange(0, rows, 2), torch.arange(1, rows, 2)])
    value, slope = value_and_slope(loss, **batch)
    stacked, slopes = value_and_slope(loss, **{k: v[order] for k, v in batch.items()}, pairs="stacked")
    assert torch.allclose(stacked, value, rtol=1e-12)
    assert torch.allclose(slopes, slope[order], rtol=1e-12)
    assert torch.equal(value_and_slope(loss, **batch, pairs="interleaved")[1], slope)


def test_a_wrong_order_is_another_loss() -> None:
    """The control: stacked pairs that are read as neighbours."""
    logprobs = -torch.arange(1.0, 9.0).view(4, 2)
    inputs = {"weights": torch.ones(4, 2), "ref_logprobs": -torch.ones(4, 2)}
    read = {order: value_and_slope(DPO(), logprobs, **inputs, pairs=order)[0] for order in ("stacked", "interleaved")}
    assert abs(read["stacked"] - read["interleaved"]) > 0.05


@given(padded(), st.booleans())
def test_sums_of_the_reference_do_for_dpo(batch: dict[str, Tensor], stacked: bool) -> None:
    """Value and slopes are those of the reference's log-probs, token by token; `weighted_row_sum` gives the sums."""
    pairs = "stacked" if stacked else None
    reference = batch.pop("ref_logprobs")
    sums = TokenBatch.from_padded(reference, batch["weights"]).weighted_row_sum()
    value, slope = value_and_slope(DPO(0.3), **batch, ref_logprobs=reference, pairs=pairs)
    by_sums, slopes = value_and_slope(DPO(0.3), **batch, ref_logprob_sums=sums, pairs=pairs)
    assert torch.allclose(by_sums, value, rtol=1e-12)
    assert torch.allclose(slopes, slope, rtol=1e-12)


@given(st.integers(1, 4), st.integers(0, 6), st.booleans(), st.integers(0, 2**31))
def test_labels_are_a_mask(rows: int, length: int, shifted: bool, seed: int) -> None:
    """Labels train the log-probs of all that is not -100; that of the first token, which nothing predicts, is none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(50, (rows, length if shifted else length + 1), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.5] = -100
    mask = (labels if shifted else labels[:, 1:]) != -100
    logprobs = -torch.rand(rows, length, generator=generator, dtype=torch.float64)
    for name in loss_names():
        if get_loss(name).gradient_kind != "constant":
            continue
        leaf = logprobs.clone().requires_grad_()
        loss = get_loss(name).evaluate(TokenBatch.from_labels(leaf, labels)).loss
        value, slope = value_and_slope(get_loss(name), logprobs, weights=mask)
        assert torch.equal(loss.detach(), value)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], slope)


def test_labels_that_are_none_are_refused() -> None:
    """Each by what it is: another length, a mask, a pad token's id, log-probs of packed tokens."""
    logprobs = torch.zeros(2, 3)
    labels = torch.tensor([[-100, 4, 5, 6], [-100, 1, -1, -1]])
    with pytest.raises(DatumError, match=r"sequence 1, label 2 is -1: a label is a token id, or -100"):
        TokenBatch.from_labels(logprobs, labels)
    with pytest.raises(LengthError, match=r"labels have shape \(2, 5\), but logprobs \(2, 3\)"):
        TokenBatch.from_labels(logprobs, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(DatumError, match=r"a mask goes to from_padded"):
        TokenBatch.from_labels(logprobs, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(LengthError, match=r"logprobs must be \[B, T\]"):
        TokenBatch.from_labels(torch.zeros(6), labels)


def test_pairs_that_are_none_are_refused() -> None:
    logprobs = torch.zeros(3, 2)
    with pytest.raises(IncompleteUnitError, match="3 sequences"):
        TokenBatch.from_padded(logprobs, torch.ones(3, 2), pairs="stacked")
    with pytest.raises(ConfigError, match="pairs must be one of interleaved, stacked"):
        TokenBatch.from_padded(logprobs[:2], torch.ones(2, 2), pairs="stack")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="and so does role"):
        TokenBatch.from_padded(logprobs[:2], torch.ones(2, 2), pairs="stacked", role=torch.tensor([0, 1]))


def test_sums_that_are_none_are_refused() -> None:
    """Beside log-probs, for a loss that needs every token's, of another sign, and not finite."""
    logprobs, sums = torch.full((2, 3), -1.0), torch.tensor([-3.0, -2.0])

    def batch(**inputs: Any) -> TokenBatch:
        return TokenBatch.from_padded(logprobs, torch.ones(2, 3), **inputs)

    with pytest.raises(ConfigError, match="ref_logprobs or ref_logprob_sums, and the TokenBatch has both"):
        DPO().evaluate(batch(ref_logprobs=logprobs, ref_logprob_sums=sums))
    with pytest.raises(MissingFieldError, match="ref_logprobs"):
        DPO().evaluate(batch())
    loss = GRPO(kl=KL("k3", 0.1))
    with pytest.raises(MissingFieldError, match="ref_logprobs"):
        loss.evaluate(batch(advantages=logprobs, rollout_logprobs=logprobs, ref_logprob_sums=sums))
    for wrong in (-sums, torch.tensor([-3.0, torch.nan])):
        with pytest.raises(InvalidDatumsError, match="not a mean, nor a negative log-likelihood"):
            DPO().evaluate(batch(ref_logprob_sums=wrong))
    with pytest.raises(LengthError, match="one number per sequence"):
        batch(ref_logprob_sums=sums[:1])


SUMS = st.sampled_from(
    [-3.0, 0.0, LARGEST_LOGPROB, *(LARGEST_LOGPROB * x for x in (0.3, 0.8, 1.5, 2.0, 3.9, 4.0, 4.1, 9.0))]
)


@given(
    weights=st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, -1.0])] * 2), min_size=2, max_size=2),
    sums=st.tuples(SUMS, SUMS),
)
@example(weights=[(1.0, 1.0), (0.25, 0.25)], sums=(-3.0, LARGEST_LOGPROB))
@example(weights=[(2.0, 2.0), (0.25, 0.25)], sums=(4.0 * LARGEST_LOGPROB, 0.8 * LARGEST_LOGPROB))
@example(weights=[(1.0, 0.0), (0.5, 0.5)], sums=(-3.0, 1.5 * LARGEST_LOGPROB))
@example(weights=[(0.5, 0.5), (0.5, 0.25)], sums=(-3.0, 9.0 * LARGEST_LOGPROB))
@example(weights=[(1.0, -1.0), (1.0, 1.0)], sums=(9.0 * LARGEST_LOGPROB, 9.0 * LARGEST_LOGPROB))
def test_sums_may_round_as_far_as_their_tokens(weights: list[tuple[float, float]], sums: tuple[float, float]) -> None:
    """A log-prob may be a little above 0, so a sum by as much per weight, of a whole token at least; a negative weight
    tells nothing of the sign."""
    tensor = torch.tensor(weights, dtype=torch.float64)
    given_sums = torch.tensor(sums, dtype=torch.float64)
    batch = TokenBatch.from_padded(torch.full_like(tensor, -1.0), tensor, ref_logprob_sums=given_sums)
    limits = [LARGEST_LOGPROB * max(math.fsum(row), 1.0) for row in weights]
    above = [i for i in range(2) if sums[i] > limits[i] and min(map(min, weights)) >= 0]
    problem = wrong_reference_sums(batch)
    assert problem is not None
    assert problem.present.item() == bool(above)
    assert [i for i in range(2) if f"sequence {i}:" in str(problem.error())] == above


def test_what_is_empty_is_said_first() -> None:
    """A response without a trained token explains a sum that is none."""
    weights, sums = torch.tensor([[1.0], [0.0]]), torch.tensor([3.0, 2.0])
    with pytest.raises(EmptyUnitError, match=r"sequences \[1\]"):
        DPO().evaluate(TokenBatch.from_padded(-weights, weights, ref_logprob_sums=sums))


def test_a_count_that_the_trainer_did_not_make_is_refused() -> None:
    """None is no count: the message says what to pass, by trainer."""
    with pytest.raises(ConfigError, match="num_items_in_batch of transformers' Trainer"):
        CrossEntropy("token_mean").with_counts(tokens=None)  # type: ignore[arg-type]
