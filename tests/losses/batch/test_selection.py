"""Selection: a value is kept where its weight is not 0, whatever the weights are made of and whoever runs the code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pullback.losses.batch.selection import finite, readable, select, select_, transformed, wide

JUNK = (math.nan, math.inf, -math.inf, 7.0)
WEIGHTS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-30])
TOKENS = st.lists(st.tuples(st.floats(-9, 9), WEIGHTS, st.sampled_from(JUNK)), min_size=1, max_size=6)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "same dtype": lambda w: w,
    "other dtype": lambda w: w.float(),
    "bool": lambda w: w != 0,
}


@pytest.mark.parametrize("kind", KINDS)
@given(tokens=TOKENS)
def test_values_are_kept_or_exactly_zero(kind: str, tokens: list[tuple[float, float, float]]) -> None:
    """Value and gradient, eagerly and under torch.func; a weight below 0 keeps too, and NaN leaves no trace."""
    values = torch.tensor([x if w else junk for x, w, junk in tokens], dtype=torch.float64)
    weights = KINDS[kind](torch.tensor([w for _, w, _ in tokens], dtype=torch.float64))
    want, slope = [x if w else 0.0 for x, w, _ in tokens], [3.0 if w else 0.0 for _, w, _ in tokens]
    leaf = values.clone().requires_grad_()
    kept = select(leaf, weights)
    assert kept.tolist() == want
    assert torch.autograd.grad(kept, leaf, torch.full_like(leaf, 3.0))[0].tolist() == slope
    assert torch.func.grad(lambda x: (3.0 * select(x, weights)).sum())(values).tolist() == slope
    assert torch.func.vmap(select)(values, weights).tolist() == want
    assert select_(values.clone(), weights).tolist() == want
    assert values.tolist() == pytest.approx([x if w else junk for x, w, junk in tokens], nan_ok=True)


def test_weights_of_a_row_broadcast() -> None:
    """One weight for several values is no weight for each: it selects all the same."""
    values, weights = torch.tensor([[1.0, math.nan], [2.0, 3.0]]), torch.tensor([[0.0], [1.0]])
    for function in (select, select_):
        assert function(values.clone(), weights.expand(2, 2)).tolist() == [[0.0, 0.0], [2.0, 3.0]]
        assert function(values.clone(), weights).tolist() == [[0.0, 0.0], [2.0, 3.0]]
    for function in (select, select_):
        assert function(values[:, 1:].clone(), weights.expand(2, 2)).tolist() == [[0.0, 0.0], [3.0, 3.0]]
    assert select(values, None) is values
    assert select_(values, None) is values


def test_memory_is_reused_only_where_it_may_be() -> None:
    """`select` leaves its values alone, `select_` writes into them unless the weights are of another kind."""
    values, weights = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    assert select(values, weights).data_ptr() != values.data_ptr()
    assert select_(values, weights != 0).data_ptr() != values.data_ptr()
    assert values.tolist() == [1.0, 2.0]
    assert select_(values, weights).data_ptr() == values.data_ptr()
    assert values.tolist() == [0.0, 2.0]


@given(numbers=st.lists(st.floats(-1e300, 1e300) | st.sampled_from(JUNK), max_size=4))
def test_one_number_that_is_not_finite_is_seen(numbers: list[float]) -> None:
    """Among others, or alone; where there is no number, none is wrong."""
    known = [math.isfinite(x) for x in numbers]
    assert finite(torch.tensor(numbers, dtype=torch.float64)) == all(known)
    assert [finite(torch.tensor(x, dtype=torch.float64)) for x in numbers] == known


class Subclass(Tensor):
    """What another library may pass."""


def test_who_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking is free for a plain tensor on the CPU in eager code, and for nothing else."""
    plain = torch.ones(2)
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((transformed(), readable(plain)))
        return x.sum()

    look(plain)
    torch.func.grad(look)(plain)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    look(plain)
    monkeypatch.undo()
    assert seen == [(False, True), (True, False), (True, False)]
    assert readable(torch.nn.Parameter(plain))
    assert not readable(plain.as_subclass(Subclass))
    assert not readable(torch.ones(2, device="meta"))

    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            seen.append((transformed(), readable(gradients[0])))
            return gradients[0].expand(2)

    leaf = torch.ones(2, requires_grad=True)
    total = Looking.apply(leaf)  # type: ignore[no-untyped-call]
    torch.autograd.grad(total, leaf, torch.ones(()), retain_graph=True)
    torch.autograd.grad(total, leaf, torch.ones(3), is_grads_batched=True)
    assert seen[3:] == [(False, True), (False, False)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    """fp32 and fp64 stay what they are; the gradient comes back in the dtype of the leaf."""
    leaf = torch.ones(3, dtype=dtype, requires_grad=True)
    assert wide(leaf).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(wide(leaf).sum(), leaf)
    assert (gradient.dtype, gradient.tolist()) == (dtype, [1.0] * 3)
