"""Closed forms of pairs: value and both slopes are those of autograd on the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from example_losses.loss_inputs import make
from hypothesis import example, given
from hypothesis import strategies as st
from oracles.formulas import PAIRS
from torch import Tensor

from pullback.losses import AGGREGATIONS, DPO, ORPO, Loss, TokenBatch
from pullback.losses.evaluation import pair_terms
from pullback.losses.evaluation.pair_terms import PairTerm, Responses, known_positive_weights
from pullback.losses.functional.closed_form import pair_form_of

FORMS = {name: pair for name, pair in PAIRS.items() if pair_form_of(pair[0]) is not None}
EACH = pytest.mark.parametrize(("definition", "options"), FORMS.values(), ids=FORMS.keys())
EDGES = [-1e4, -50.0, -1.0, math.log(0.9), -1e-7, 0.0]
SIDES = st.floats(-60.0, 0.0)
Results = tuple[Tensor, ...]


def by_autograd(definition: Callable[..., Tensor], sides: Sequence[Tensor], options: Sequence[Any]) -> Results:
    """Value and slopes of a definition."""
    leaves = [side.clone().requires_grad_() for side in sides]
    value = definition(*leaves, *options)
    slopes = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    return value.detach(), *slopes


def closed(definition: Callable[..., Tensor], sides: Sequence[Tensor], options: Sequence[Any]) -> Results:
    form = pair_form_of(definition)
    assert form is not None
    both = torch.stack(list(sides), 1)
    value, slopes = form(both, *options)
    assert torch.equal(both, torch.stack(list(sides), 1)), "a form overwrites its argument"
    assert len({t.untyped_storage().data_ptr() for t in (value, slopes, both)}) == 3
    return value, *slopes.unbind(1)


def distance(have: Results, want: Results) -> float:
    """Largest difference, relative where what is wanted is above 1."""
    pairs = zip(have, want, strict=True)
    return max(float(((a - b).abs() / b.abs().clamp(min=1.0)).max()) for a, b in pairs)


def tensors(pairs: list[tuple[float, float]]) -> list[Tensor]:
    pairs = [*pairs, *((a, b) for a in EDGES for b in EDGES)]
    return [torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True)]


def test_every_loss_of_pairs_has_one() -> None:
    """What the registered losses are made of is covered here."""
    assert set(FORMS) == {"dpo", "dpo smoothed", "odds_ratio", "simpo", "chosen_nll"}


@EACH
@given(pairs=st.lists(st.tuples(SIDES, SIDES), max_size=30))
def test_autograd_of_the_definition(
    definition: Callable[..., Tensor], options: tuple[float, ...], pairs: list[tuple[float, float]]
) -> None:
    """Value and slopes agree to 1e-12 in fp64, beyond the tangent too; inputs keep their values, results share nothing."""
    sides = tensors(pairs)
    assert distance(closed(definition, sides, options), by_autograd(definition, sides, options)) <= 1e-12


@EACH
def test_wrong_slopes_are_found(definition: Callable[..., Tensor], options: tuple[float, ...]) -> None:
    """Negative control: a slope that is off by a part in 1e10, and sides that are exchanged."""
    sides = tensors([])
    value, chosen, rejected = closed(definition, sides, options)
    want = by_autograd(definition, sides, options)
    assert distance((value, chosen * (1 + 1e-10), rejected), want) > 1e-12
    assert distance((value, rejected, chosen), want) > 1e-12


@pytest.mark.parametrize("loss", [DPO(0.3, 0.1), ORPO()], ids=lambda x: x.name)
@pytest.mark.parametrize("pair_ids", [True, False])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_the_loss_is_that_of_the_definitions(
    loss: Loss, pair_ids: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its closed forms a loss has the same value and gradient, from plain autograd."""
    inputs = make(loss, padded=padded, pair_ids=pair_ids, dtype=torch.float64)

    def result() -> Results:
        leaf = inputs.tensors["logprobs"].clone().requires_grad_()
        value = loss.evaluate(inputs.batch(leaf)).loss
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    found = result()
    monkeypatch.setattr(pair_terms, "pair_form_of", lambda definition: None)
    assert distance(found, result()) <= 1e-14


def test_one_pass_for_all_terms() -> None:
    """Both terms of ORPO hang on one node, so that the tokens are gone over once in the backward."""
    inputs = make(ORPO(), padded=True)
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    first, second = ORPO().undivided(inputs.batch(leaf)).parts
    assert first.numerator.grad_fn is not None
    assert _leaf_node(first.numerator) is _leaf_node(second.numerator)


def _leaf_node(total: Tensor) -> object:
    """Return the node that the leaf's own node is fed by."""
    node: Any = total.grad_fn
    while type(node.next_functions[0][0]).__name__ != "AccumulateGrad":
        node = node.next_functions[0][0]
    return node


WEIGHTS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 2.0, -1.0])] * 2), min_size=4, max_size=4)


@given(weights=WEIGHTS)
@example(weights=[(0.25, 0.5), (0.0, 0.0), (2.0, 0.0), (0.5, 0.0)])
@example(weights=[(0.25, 0.0)] * 4)
def test_means_of_responses(weights: list[tuple[float, float]]) -> None:
    """A weighted mean where the weights have a positive sum; elsewhere the sum itself, so that nothing divides by 0."""
    x = torch.tensor([[-1.0, -2.0], [-3.0, -0.5], [-0.7, -4.0], [-2.5, -1.5]], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch.from_padded(x, torch.tensor(weights, dtype=torch.float64))
    totals = [math.fsum(row) for row in weights]
    assert known_positive_weights(batch) == all(total > 0 for total in totals)
    by = [total if total > 0 else 1.0 for total in totals]
    means = [
        math.fsum(w * a for w, a in zip(*at, strict=True)) / d for *at, d in zip(weights, x.tolist(), by, strict=True)
    ]
    chosen, rejected = Responses(mean=True).sides(batch)
    assert chosen.tolist() == pytest.approx(means[::2], rel=1e-12, abs=1e-14)
    assert rejected.tolist() == pytest.approx(means[1::2], rel=1e-12, abs=1e-14)
    slopes = Responses(mean=True).slopes(batch, torch.tensor([[3.0, -5.0]] * 2, dtype=torch.float64))
    assert slopes.tolist() == pytest.approx([3.0 / by[0], -5.0 / by[1], 3.0 / by[2], -5.0 / by[3]], rel=1e-12)


def test_values_have_no_graph() -> None:
    """Also those of a definition that has parameters of its own."""
    own = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    term = PairTerm("mine", lambda a, b: own * (a - b), Responses(), (), AGGREGATIONS["pair_mean"])
    values = term.values(make(DPO(), dtype=torch.float64).batch())
    assert not values.requires_grad
