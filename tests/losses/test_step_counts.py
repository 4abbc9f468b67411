"""Totals of a step: the shares of any split of a batch add up to the loss of the whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from example_losses.loss_inputs import VARIANTS, Inputs, ids, make
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pullback.errors import ConfigError, DatumError, IncompleteUnitError
from pullback.losses import DPO, ORPO, CrossEntropy, Loss, TokenBatch
from pullback.losses.counts import count_units, divisor
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


BY_GROUP = [loss for loss in VARIANTS if "group" in loss.main_aggregation.name]


@pytest.mark.parametrize("loss", BY_GROUP, ids=ids(BY_GROUP))
@given(data=st.data())
def test_a_group_is_not_cut(loss: Loss, data: st.DataObject) -> None:
    """Any split counts the groups of the whole, or is refused because a group that is trained lies in two parts."""
    inputs = make(loss, padded=True, lengths=LENGTHS, old=True)
    silent = data.draw(st.sets(st.integers(0, 5)))
    inputs.tensors["weights"][sorted(silent)] = 0.0
    owner = data.draw(st.lists(st.integers(0, 1), min_size=6, max_size=6))
    parts = [rows(inputs, [i for i in range(6) if owner[i] == k]) for k in (0, 1) if k in owner]
    group = inputs.tensors["group_id"].tolist()
    there = [{group[i] for i in range(6) if owner[i] == k and i not in silent} for k in (0, 1)]
    if cut := sorted(there[0] & there[1]):
        with pytest.raises(IncompleteUnitError, match=re.escape(f"groups {cut} lie in two of the batches")):
            loss.counts([part.batch() for part in parts])
        return
    assert loss.counts([part.batch() for part in parts]) == loss.counts([inputs.batch()])


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
    alone: Any = TokenBatch.from_padded(torch.zeros(2, 3), torch.ones(2, 3))
    assert loss.counts([alone]) == {"tokens": 6.0}
    with pytest.raises(DatumError, match=r"in a list; for one alone write counts\(\[batch\]\)"):
        loss.counts(alone)


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
        (CrossEntropy("token_mean"), {"tokens": torch.ones(0)}, "one number"),
        (CrossEntropy("token_mean"), {"tokens": torch.zeros(())}, "above 0"),
        (
            CrossEntropy("token_mean"),
            {"sequences": 8.0},
            "divided by tokens, but the totals given are of sequences: write counts=",
        ),
        (CrossEntropy("token_mean"), {"tokens": 1.0}, "this call alone has"),
        (DPO(), {"pairs": 1.0}, "this call alone has"),
        (
            CrossEntropy(),
            {"tokens": 100.0},
            r"divided by nothing, .* of tokens: it is a sum, so write counts=\{\}",
        ),
        (
            ORPO(nll="token_mean", aggregation="sum"),
            {"tokens": 99.0, "pairs": 9.0},
            "divided by tokens, but the totals given are of pairs, tokens: write",
        ),
        (CrossEntropy("token_mean"), 4, "must map"),
    ],
)
def test_wrong_counts(loss: Loss, counts: Any, words: str) -> None:
    """Totals that are unknown, unusable, useless or too small are refused."""
    with pytest.raises(ConfigError, match=words):
        loss.evaluate(make(loss).batch(), counts)


def test_a_sum_beside_a_mean_is_not_divided() -> None:
    """With the call's own total for the mean, the loss of both terms is what it is without."""
    loss = ORPO(nll="token_mean", aggregation="sum")
    batch = make(loss, dtype=torch.float64).batch()
    counts = loss.counts([batch])
    assert counts.keys() == {"tokens"}
    assert loss.evaluate(batch, counts).loss.item() == pytest.approx(loss.evaluate(batch).loss.item(), rel=1e-12)


@pytest.mark.parametrize("packed", [True, False])
@given(data=st.data())
def test_counts_of_some_tokens(packed: bool, data: st.DataObject) -> None:
    """With several candidates per token: a position counts where any is trained and any is asked for."""

    def drawn(element: st.SearchStrategy[Any]) -> list[list[list[Any]]]:
        pair = st.lists(element, min_size=2, max_size=2)
        return data.draw(st.lists(st.lists(pair, min_size=3, max_size=3), min_size=4, max_size=4))

    weights, where = drawn(st.sampled_from([0.0, 1.0, 0.5])), drawn(st.booleans())
    tensors = torch.tensor(weights, dtype=torch.float64), torch.tensor(where)
    groups, zeros = torch.tensor([0, 1, 0, 2]), torch.zeros_like(tensors[0])
    if packed:
        batch = TokenBatch.from_packed(zeros.flatten(0, 1), [3] * 4, weights=tensors[0].flatten(0, 1), group_id=groups)
    else:
        batch = TokenBatch.from_padded(zeros, tensors[0], group_id=groups)
    kept = [[any(w) and any(at) for w, at in zip(*rows, strict=True)] for rows in zip(weights, where, strict=True)]
    there = [any(row) for row in kept]
    want = {
        "tokens": sum(map(sum, kept)),
        "weight_sum": sum(
            sum(w) for rows, at in zip(weights, kept, strict=True) for w, k in zip(rows, at, strict=True) if k
        ),
        "sequences": sum(there),
        "all_sequences": 4,
        "groups": len({g for g, t in zip([0, 1, 0, 2], there, strict=True) if t}),
        "pairs": 2,
        "none": 1,
    }
    asked = tensors[1].flatten(0, 1) if packed else tensors[1]
    for name, count in want.items():
        assert float(count_units(batch, name, asked)) == count, name  # type: ignore[arg-type]


def test_an_empty_unit_is_divided_by_one() -> None:
    """Every other count is what it is, as a number or a tensor, also where it cannot be looked at."""
    counts = [0.0, 3.0, 0.5, -2.0]
    want = [1.0, 3.0, 0.5, -2.0]
    assert [divisor(count) for count in counts] == want
    assert [float(divisor(torch.tensor(count))) for count in counts] == want
    mapped = torch.func.vmap(lambda count: torch.as_tensor(divisor(count)))(torch.tensor(counts))
    assert mapped.tolist() == want


def test_gold_responses_are_in_no_pair() -> None:
    """A pair is counted by its two sides; a gold response beside it has none."""
    role = torch.tensor([1, 2, 0, 0, 1, 2])
    x, pair_id = torch.full((6, 2), -1.0), torch.tensor([4, 4, 4, 7, 7, 7])
    batch = TokenBatch.from_padded(x, torch.ones(6, 2), role=role, pair_id=pair_id)
    assert count_units(batch, "pairs") == 2.0
    assert count_units(TokenBatch.from_padded(x, torch.ones(6, 2)), "pairs") == 3.0


@pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))
def test_denominators_are_those_of_the_terms(loss: Loss) -> None:
    """What a loss says without a batch is what its terms are divided by."""
    terms = loss.terms(make(loss).batch())
    assert loss.denominators == {term.aggregation.denominator for term in terms} - {"none"}
