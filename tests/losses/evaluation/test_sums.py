"""The two sums: eagerly and under torch.func they are plain loops, whatever lies where nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pullback.losses import DPO, DRO, ORPO, CrossEntropy, Loss, SimPO, TokenBatch
from pullback.losses import functional as F
from pullback.losses.batch.layout import Layout, Packed, Padded
from pullback.losses.batch.sums import row_sum, weighted_sum
from pullback.losses.evaluation.token_sum import token_sum, token_values

NUMBERS = st.floats(-3, 3)
TOKENS = st.lists(
    st.tuples(NUMBERS, NUMBERS, st.sampled_from([0.0, 1.0, 2.0, -0.5]), st.sampled_from([math.nan, math.inf, 7.0])),
    min_size=4,
    max_size=4,
)
JUNK = [(-1.0, 2.0, 0.0, math.nan), (-2.0, 0.5, 2.0, 7.0), (0.7, -1.0, -0.5, 7.0), (1.0, 1.0, 0.0, math.inf)]
LAYOUTS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "packed": (Packed(torch.Size([4]), torch.tensor([0, 1, 4])), (4,)),
    "padded": (Padded(torch.Size([2, 2])), (2, 2)),
}
ROWS = {"packed": [[0], [1, 2, 3]], "padded": [[0, 1], [2, 3]]}
Tokens = Sequence[tuple[float, float, float, float]]

DENORMAL = 1e-307  # below the smallest number of full precision, where products are rounded in another order


def columns(tokens: Tokens, shape: tuple[int, ...], scaled: bool = True) -> list[Tensor]:
    """Values and what is subtracted, with junk where the weight is 0, and the weights, or a mask of ones and zeros."""
    rows = [(x if w else junk, m if w else junk, w if scaled else float(w != 0)) for x, m, w, junk in tokens]
    return [torch.tensor(column, dtype=torch.float64).view(shape) for column in zip(*rows, strict=True)]


def both_ways(function: Callable[[Tensor], Tensor], x: Tensor) -> list[tuple[list[float], list[float]]]:
    """Value and slope of a sum, eagerly and under torch.func; its gradient is asked for with 1, 2, ... of its entries."""

    def weighted(at: Tensor) -> tuple[Tensor, Tensor]:
        value = function(at)
        return (value * torch.arange(1.0, value.numel() + 1, dtype=value.dtype).view(value.shape)).sum(), value

    leaf = x.clone().requires_grad_()
    total, value = weighted(leaf)
    (slope,) = torch.autograd.grad(total, leaf)
    slope_too, value_too = torch.func.grad(weighted, has_aux=True)(x)
    return [(v.flatten().tolist(), s.flatten().tolist()) for v, s in ((value, slope), (value_too, slope_too))]


def same(found: list[tuple[list[float], list[float]]], value: list[float], slope: list[float]) -> None:
    for have in found:
        assert have[0] == pytest.approx(value, rel=1e-12, abs=1e-12)
        assert have[1] == pytest.approx(slope, rel=1e-12, abs=DENORMAL)
        assert all(x == 0.0 for x, y in zip(have[1], slope, strict=True) if y == 0.0)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
@given(tokens=TOKENS)
@example(tokens=JUNK)
def test_row_sums(name: str, scaled: bool, tokens: Tokens) -> None:
    """Of what is left when another tensor is subtracted, or of the values alone; each row's cotangent goes to its tokens."""
    layout, shape = LAYOUTS[name]
    x, minus, weights = columns(tokens, shape, scaled)
    factor = [w if scaled else float(w != 0) for _, _, w, _ in tokens]
    scale = weights if scaled else None
    slope = [(1.0 + row) * factor[j] for row, at in enumerate(ROWS[name]) for j in at]
    for other, shift in ((None, 0.0), (minus, 1.0)):
        value = [math.fsum(factor[j] * (tokens[j][0] - shift * tokens[j][1]) for j in at) for at in ROWS[name]]
        same(both_ways(lambda y, other=other: row_sum(y, other, weights, scale, layout), x), value, slope)  # type: ignore[misc]
    whole = torch.nan_to_num(x, 7.0, 7.0)
    kept = [[whole.flatten()[j].item() for j in at] for at in ROWS[name]]
    found = both_ways(lambda y: row_sum(y, None, weights, scale, layout), whole)
    same(
        found,
        [
            math.fsum(factor[j] * v for j, v in zip(at, row, strict=True))
            for at, row in zip(ROWS[name], kept, strict=True)
        ],
        slope,
    )
    found = both_ways(lambda y: row_sum(y, None, None, None, layout), whole)
    of_all = [1.0 + row for row, at in enumerate(ROWS[name]) for _ in at]
    same(found, [math.fsum(row) for row in kept], of_all)
    found = both_ways(lambda y: row_sum(y, whole / 4, None, None, layout), whole)
    same(found, [math.fsum(0.75 * v for v in row) for row in kept], of_all)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("coefficient", [1.0, -0.3])
@given(tokens=TOKENS)
@example(tokens=JUNK)
def test_weighted_sums(scaled: bool, coefficient: float, tokens: Tokens) -> None:
    """A coefficient times the weighted values; an infinite cotangent does not reach what is not trained."""
    x, _, weights = columns(tokens, (4,), scaled)
    factor = [coefficient * (w if scaled else float(w != 0)) for _, _, w, _ in tokens]
    scale = weights if scaled else None
    value = math.fsum(f * t[0] for f, t in zip(factor, tokens, strict=True))
    same(both_ways(lambda y: weighted_sum(y, weights, scale, coefficient), x), [value], factor)
    whole = torch.nan_to_num(x, 7.0, 7.0)
    same(both_ways(lambda y: weighted_sum(y, weights, scale, coefficient), whole), [value], factor)
    total = coefficient * whole.sum().item()
    same(both_ways(lambda y: weighted_sum(y, None, None, coefficient), whole), [total], [coefficient] * 4)
    leaf = x.clone().requires_grad_()
    for sums in (
        weighted_sum(leaf, weights, scale, coefficient),
        row_sum(leaf, None, weights, scale, LAYOUTS["packed"][0]).sum(),
    ):
        (slope,) = torch.autograd.grad(sums, leaf, torch.tensor(math.inf, dtype=torch.float64))
        assert [s == 0.0 for s in slope.tolist()] == [t[2] == 0.0 for t in tokens]


@pytest.mark.parametrize("definition", ["closed", "open"])
@pytest.mark.parametrize("coefficient", [1.0, -0.3])
@given(tokens=TOKENS)
@example(tokens=JUNK)
def test_token_sums(definition: str, coefficient: float, tokens: Tokens) -> None:
    """Of a function of each token times factors, one per token and one for all; second derivatives are the function's."""

    def square(x: Tensor, other: Tensor, beta: float) -> Tensor:
        return 0.5 * beta * (x - other).square()

    function: Any = square if definition == "open" else F.kl
    arguments: Any = (0.6,) if definition == "open" else ("k2",)
    beta = 0.6 if definition == "open" else 1.0
    x, minus, weights = columns(tokens, (4,))
    factors = (weights, minus, torch.tensor([2.0], dtype=torch.float64))
    factor = [2.0 * w * m * coefficient * beta for _, m, w, _ in tokens]
    value = math.fsum(f * 0.5 * (t[0] - t[1]) ** 2 for f, t in zip(factor, tokens, strict=True))
    slope = [f * (t[0] - t[1]) for f, t in zip(factor, tokens, strict=True)]

    def total(y: Tensor) -> Tensor:
        return token_sum(y, function, (minus, *arguments), factors, weights, coefficient)

    same(both_ways(total, x), [value], slope)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert second.tolist() == pytest.approx(factor, rel=1e-12, abs=DENORMAL)
    each = token_values(leaf, function, (minus, *arguments), weights)
    want = [beta * 0.5 * (a - b) ** 2 if w else 0.0 for a, b, w, _ in tokens]
    assert each.tolist() == pytest.approx(want, rel=1e-12, abs=1e-14)
    (slopes,) = torch.autograd.grad(each.sum(), leaf)
    assert slopes.tolist() == pytest.approx(
        [beta * (a - b) if w else 0.0 for a, b, w, _ in tokens], rel=1e-12, abs=DENORMAL
    )


def test_a_sum_of_a_constant_has_a_zero_second_derivative() -> None:
    """A function with no slope, differentiated twice, gives zeros and no error; so does a slope that does not depend on x."""
    leaf = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    for definition, args, slope in ((F.kl_penalty, (0.0, "k3", "none"), 0.0), (F.nll, (), -1.0)):
        (first,) = torch.autograd.grad(token_sum(leaf, definition, args, (), None), leaf, create_graph=True)
        assert first.tolist() == [slope, slope]
        (second,) = torch.autograd.grad((first * leaf).sum(), leaf)
        assert second.tolist() == [slope, slope]


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy("token_mean"), DRO(), DPO(), ORPO(), SimPO()], ids=repr)
def test_a_total_beyond_the_range_is_infinite(loss: Loss) -> None:
    """The smallest log-prob of fp32, which some write for what cannot be, gives a number or infinity, and no error."""
    lowest = torch.finfo(torch.float32).min
    others = {"advantages": torch.ones(2, 2), "rollout_logprobs": -torch.ones(2, 2), "ref_logprobs": -torch.ones(2, 2)}

    def value(dtype: torch.dtype) -> Tensor:
        leaf = torch.full((2, 2), lowest, dtype=dtype).requires_grad_()
        inputs = {name: tensor.to(dtype) for name, tensor in others.items()}
        return loss.evaluate(TokenBatch.from_padded(leaf, torch.ones(2, 2), **inputs)).loss.detach()

    found, want = value(torch.float32).item(), value(torch.float64).item()
    assert found == pytest.approx(want, rel=1e-5) or found == math.inf


def sums() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each sum with a coefficient and weights, as a function of four log-probs."""
    weights = torch.tensor([1.0, 0.0, 2.0, -0.5], dtype=torch.float64)
    layout = LAYOUTS["packed"][0]
    return {
        "rows": lambda x: row_sum(x, None, weights, weights, layout).sum(),
        "rows of all": lambda x: row_sum(x, None, None, None, layout).square().sum(),
        "weighted": lambda x: weighted_sum(x, weights, weights, -0.3),
        "weighted of all": lambda x: weighted_sum(x, None, None, -0.3),
        "tokens": lambda x: token_sum(x, F.kl, (0.0, "k2"), (weights,), weights, -0.3),
    }


@pytest.mark.parametrize("name", sums())
def test_several_cotangents_at_once(name: str) -> None:
    """A batch of cotangents gives the batch of gradients that they give one by one."""
    leaf = torch.tensor([-1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    total = sums()[name](leaf)
    cotangents = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    (batched,) = torch.autograd.grad(total, leaf, cotangents, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(total, leaf, c, retain_graph=True)[0] for c in cotangents]
    assert torch.allclose(batched, torch.stack(one_by_one), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", sums())
def test_second_derivatives_of_functions_of_a_sum(name: str) -> None:
    """The cotangent of a sum may itself depend on the log-probs."""
    leaf = torch.tensor([-1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sums()[name](x).square(), leaf)


@given(tokens=TOKENS, bad=st.sampled_from([math.inf, -math.inf, math.nan]))
@example(tokens=JUNK, bad=math.inf)
def test_a_second_backward_selects_too(tokens: Tokens, bad: float) -> None:
    """What is no number at an untrained token does not reach the cotangent of its row."""
    x, _, weights = columns(tokens, (4,))
    leaf, g = x.requires_grad_(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    rows = row_sum(leaf, None, weights, weights, LAYOUTS["packed"][0])
    (slope,) = torch.autograd.grad(rows, leaf, g, create_graph=True)
    (found,) = torch.autograd.grad(slope, g, torch.where(weights != 0, 1.0, bad))
    want = [math.fsum(tokens[j][2] for j in at) for at in ROWS["packed"]]
    assert found.tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
def test_a_row_sum_without_a_graph_has_a_derivative_forwards() -> None:
    """That of the sum is the sum of those of its tokens, which are selected as they are."""
    x, weights = torch.tensor([[-1.0, math.nan]]), torch.tensor([[2.0, 0.0]])
    with forward.dual_level(), torch.no_grad():
        dual = forward.make_dual(x, torch.tensor([[3.0, 5.0]]))
        for w, want in ((weights, 6.0), (None, 8.0)):
            rows = row_sum(dual, None, w, w, Padded(torch.Size([1, 2])))
            assert forward.unpack_dual(rows).tangent.tolist() == [want]


@pytest.mark.parametrize("coefficient", [1.0, -0.3])
@given(tokens=TOKENS)
@example(tokens=JUNK)
def test_what_a_compiler_runs(coefficient: float, tokens: Tokens) -> None:
    """The eager sum, with its slope attached as a constant: also where the other arguments require gradients."""
    x, minus, weights = columns(tokens, (4,))
    leaf, other = x.requires_grad_(), minus.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        total = token_sum(leaf, F.kl, (other, "k2"), (weights,), weights, coefficient)
        (slope,) = torch.autograd.grad(total, leaf, torch.tensor(3.0, dtype=torch.float64), create_graph=True)
    factor = [coefficient * w for _, _, w, _ in tokens]
    value = math.fsum(f * 0.5 * (a - b) ** 2 for f, (a, b, _, _) in zip(factor, tokens, strict=True))
    assert total.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    want = [3.0 * f * (a - b) for f, (a, b, _, _) in zip(factor, tokens, strict=True)]
    assert slope.tolist() == pytest.approx(want, rel=1e-12, abs=DENORMAL)
    assert not slope.requires_grad


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_no_step_of_a_token_sum_is_nan() -> None:
    """Arguments and factors are selected before they are used, so that a search for the origin of a NaN finds none here."""
    x, minus, weights = columns(JUNK, (2, 2))
    minus = minus.nan_to_num(math.nan, math.nan)

    def distance(x: Tensor, other: Tensor) -> Tensor:
        return 0.5 * (x - other).square()

    leaf = x.requires_grad_()
    with torch.autograd.detect_anomaly():
        total = token_sum(leaf, distance, (minus,), (weights, minus), weights)
        (slope,) = torch.autograd.grad(total, leaf)
    rows = [(w * m, a - m, w) for a, m, w, _ in JUNK]
    assert total.item() == pytest.approx(math.fsum(0.5 * f * d**2 for f, d, w in rows if w), rel=1e-12)
    assert slope.flatten().tolist() == pytest.approx([f * d if w else 0.0 for f, d, w in rows], rel=1e-12)
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan"):
        torch.autograd.grad(distance(leaf, minus).sum(), leaf)


def test_a_row_of_which_nothing_is_trained_may_have_any_factor() -> None:
    """It is selected before it multiplies, also where it is one number for a row."""
    x, factor = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([[2.0], [math.nan]])
    weights = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    for definition in (F.nll, lambda y: -y):
        found = both_ways(lambda y, d=definition: token_sum(y, d, (), (weights, factor), weights), x)  # type: ignore[misc]
        same(found, [4.0], [-2.0, -1.0, 0.0, 0.0])


def test_a_function_that_is_infinite_at_zero() -> None:
    """0 stands in for what is not trained; what a function makes of it leaves no trace."""
    leaf = torch.tensor([-0.5, math.nan], dtype=torch.float64, requires_grad=True)
    values = token_values(leaf, lambda x: torch.log(-x), (), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert values.tolist() == pytest.approx([math.log(0.5), 0.0])
    assert torch.autograd.grad(values.sum(), leaf)[0].tolist() == [-2.0, 0.0]
