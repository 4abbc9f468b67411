"""Totals of a step: the shares of any split of a batch add up to the loss of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_inputs import VARIANTS, Inputs, ids, make
from torch import Tensor

from pullback.errors import ConfigError, DatumError
from pullback.losses import DPO, CrossEntropy, Loss
from pullback.testing import Case, CaseSequence

LENGTHS = (5, 3, 4, 6, 2, 7)


def units(loss: Loss) -> list[list[int]]:
    """Return the sequences that a split must not part: pairs, or groups of a mean over groups."""
    if loss.gradient_kind == "pair":
        return [[0, 1], [2, 3], [4, 5]]
    if "group" in loss.main_aggregation.name:
        ids = make(loss, lengths=LENGTHS).tensors["group_id"].tolist()
        return [[i for i in range(6) if ids[i] == group] for group in sorted(set(ids))]
    return [[i] for i in range(6)]


def rows(inputs: Inputs, chosen: list[int]) -> Inputs:
    """Return some of the sequences of padded inputs."""
    return inputs.mapped(lambda _, tensor: tensor[chosen])


def share(evaluate: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    value = evaluate(inputs.batch(leaf))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))
@given(data=st.data())
def test_shares_add_up(loss: Loss, data: st.DataObject) -> None:
    """With the counts of all parts, values and gradients of the parts are those of one call; averaged, times the parts."""
    inputs = make(loss, padded=True, dtype=torch.float64, lengths=LENGTHS, old=True)
    value, gradient = share(lambda batch: loss.evaluate(batch).loss, inputs)
    owner = [data.draw(st.integers(0, 2)) for _ in units(loss)]
    parts = [[i for unit, at in zip(units(loss), owner, strict=True) if at == k for i in unit] for k in range(3)]
    parts = [part for part in parts if part]
    counts: Any = loss.counts([rows(inputs, part).batch() for part in parts])
    assert counts == pytest.approx(loss.counts([inputs.batch()]))
    times = data.draw(st.sampled_from([1, len(parts)]))
    counted = loss.with_counts(averaged_over=times, **counts)
    shares = [share(counted.evaluate, rows(inputs, part)) for part in parts]
    total = torch.stack([each for each, _ in shares]).sum() / times
    torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-14)
    for part, (_, own) in zip(parts, shares, strict=True):
        torch.testing.assert_close(own / times, gradient[part], rtol=1e-12, atol=1e-14)


def test_counts_of_datums() -> None:
    """Datums are counted as their batch is, and a call on them is a share."""
    s = CaseSequence([-1.0, -2.0], [1.0, 1.0], [1.0, -1.0], [-1.1, -2.0], [-1.0, -2.0], [-1.0, -1.0])
    data, leaves = Case((s, s, s, s)).datums()
    loss = CrossEntropy("token_mean")
    assert loss.counts(data) == {"tokens": 8.0}
    counted = loss.with_counts(tokens=loss.counts(data)["tokens"])
    shares = [counted(data[:1], leaves[:1])[0], counted(data[1:], leaves[1:])[0]]
    assert float(sum(shares).detach()) == pytest.approx(float(loss(data, leaves)[0].detach()))  # type: ignore[union-attr]
    assert DPO().counts(data) == {"pairs": 2.0}
    assert CrossEntropy().counts(data) == {}
    with pytest.raises(DatumError):
        loss.counts([1, 2])


@pytest.mark.parametrize(
    ("loss", "counts", "words"),
    [
        (CrossEntropy("token_mean"), {"token": 8.0}, "did you mean 'tokens'"),
        (CrossEntropy("token_mean"), {"tokens": 0.0}, "above 0"),
        (CrossEntropy("token_mean"), {"tokens": -3.0}, "above 0"),
        (CrossEntropy("token_mean"), {"tokens": float("inf")}, "finite"),
        (CrossEntropy("token_mean"), {"tokens": float("nan")}, "finite"),
        (CrossEntropy("token_mean"), {"tokens": True}, "a number"),
        (CrossEntropy("token_mean"), {"tokens": torch.ones(2)}, "one number"),
        (CrossEntropy("token_mean"), {"tokens": torch.zeros(())}, "above 0"),
        (CrossEntropy("token_mean"), {"sequences": 8.0}, "lacks 'tokens'|would be ignored"),
        (CrossEntropy("token_mean"), {"tokens": 1.0}, "this call alone has"),
        (DPO(), {"pairs": 1.0}, "this call alone has"),
        (CrossEntropy(), {"tokens": 100.0}, "would be ignored"),
        (CrossEntropy("token_mean"), 4, "must map"),
    ],
)
def test_wrong_counts(loss: Loss, counts: Any, words: str) -> None:
    """Totals that are unknown, unusable, useless or too small are refused."""
    with pytest.raises(ConfigError, match=words):
        loss.evaluate(make(loss).batch(), counts)


@pytest.mark.parametrize("times", [0, -1, 1.5, True])
def test_wrong_averages(times: Any) -> None:
    """What a trainer averages over is a positive whole number."""
    with pytest.raises(ConfigError, match="averaged_over"):
        CrossEntropy("token_mean").with_counts(averaged_over=times, tokens=8.0)
