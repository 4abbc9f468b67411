"""Every formula against scalar arithmetic, and every closed form against autograd of its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracles.formulas import (
    ADVANTAGES,
    EDGES,
    FORMULAS,
    LOG_RATIOS,
    PAIRS,
    PEAK,
    Formula,
    by_autograd,
    closed,
    distance,
    shares_memory,
    tensors,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.losses import functional as F
from pullback.losses.functional.numerics import bounded_exp, bounded_expm1

EACH = pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS.keys())
TOKENS = st.tuples(
    st.floats(-50, 0) | st.just(-1e4), st.floats(-1.5, 1.5) | st.floats(-50, 50), st.floats(-3, 3) | st.just(0.0)
)


@EACH
@given(tokens=st.lists(TOKENS, max_size=40))
def test_closed_form_is_autograd_of_the_definition(formula: Formula, tokens: list[tuple[float, float, float]]) -> None:
    """Value and slope agree to 1e-12 in fp64, on the edges of ranges and far outside too."""
    x, anchor, advantages = tensors(EDGES + tokens)
    arguments = formula.arguments(anchor, advantages)
    assert distance(closed(formula.definition, x, *arguments), by_autograd(formula.definition, x, *arguments)) <= 1e-12


@EACH
@given(tokens=st.lists(TOKENS, min_size=1, max_size=40))
def test_definition_is_scalar_arithmetic(formula: Formula, tokens: list[tuple[float, float, float]]) -> None:
    """Value and slope are those of a case-by-case formula; a ratio within rounding of an edge may fall on either side."""
    steps = [0.0, -0.1, 0.3, -0.5, 1.0, 1.2, 3.0, 25.0, -25.0, 90.0, -1e4, 1e4]
    edges = {math.log(bound) for bound in (0.5, 0.8, 1.2, 1.28, 3.0, 5.0)}
    tokens += itertools.product([-0.5], steps, ADVANTAGES)
    tokens = [token for token in tokens if min(abs(token[1] - edge) for edge in edges) > 1e-9]
    x, anchor, advantages = tensors(tokens)
    rows = zip(x.tolist(), (x - anchor).tolist(), advantages.tolist(), strict=True)
    want = torch.tensor([formula.scalar(*row) for row in rows], dtype=torch.float64)
    have = by_autograd(formula.definition, x, *formula.arguments(anchor, advantages))
    assert distance(have, (want[:, 0], want[:, 1])) <= 1e-12


@EACH
@given(
    steps=st.lists(st.tuples(st.integers(-3000, 0), st.integers(-160000, 160000), st.integers(-300, 300)), min_size=1)
)
def test_fp32_is_the_definition_in_fp64(formula: Formula, steps: list[tuple[int, int, int]]) -> None:
    """In fp32 the closed form is within 1e-6 of the fp64 definition, at inputs whose differences are exact."""
    tokens = [(x / 64, d / 4096, a / 128) for x, d, a in steps]
    narrow, wide = tensors(tokens, torch.float32), tensors(tokens)
    have = closed(formula.definition, narrow[0], *formula.arguments(*narrow[1:]))
    want = by_autograd(formula.definition, wide[0], *formula.arguments(*wide[1:]))
    assert have[0].dtype == have[1].dtype == torch.float32
    terms = (wide[0] * wide[2]).abs() if formula.definition is F.dro else 0.0  # the two terms of its value may cancel
    assert distance(have, want, terms) <= 1e-6


@EACH
@given(tokens=st.lists(st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 1e4), st.floats(-1e6, 1e6)), min_size=1))
def test_finite_inputs_give_finite_results(formula: Formula, tokens: list[tuple[float, float, float]]) -> None:
    """No overflow and no NaN in fp32, in the definition's gradient as in the closed form."""
    x, anchor, advantages = tensors(
        tokens + [(-0.5, d, a) for d in LOG_RATIOS for a in (1e6, -1e6, 0.0)], torch.float32
    )
    arguments = formula.arguments(anchor, advantages)
    for results in (by_autograd(formula.definition, x, *arguments), closed(formula.definition, x, *arguments)):
        assert all(bool(t.isfinite().all()) for t in results)


@EACH
def test_closed_form_returns_fresh_tensors(formula: Formula) -> None:
    """Value and slope alias nothing, inputs keep their values, whatever broadcasts."""
    x, anchor, advantages = (t.reshape(22, -1)[:, :8].contiguous() for t in tensors(EDGES[:176]))
    row = torch.full((22, 1), -0.5, dtype=torch.float64)
    for inputs in [(x, anchor, advantages), (x, anchor[:, :1], row), (x, 0.0, row), (row.expand(22, 8), anchor, row)]:
        arguments = formula.arguments(*inputs[1:])  # type: ignore[arg-type]
        before = [t.clone() if isinstance(t, Tensor) else t for t in (inputs[0], *arguments)]
        results = closed(formula.definition, inputs[0], *arguments)
        assert not shares_memory(results, (inputs[0], *arguments))
        for old, new in zip(before, (inputs[0], *arguments), strict=True):
            assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
        assert distance(results, by_autograd(formula.definition, inputs[0], *arguments)) <= 1e-12
        assert results[0].shape == results[1].shape == (22, 8)


def test_planted_errors_are_found() -> None:
    """Negative control: a wrong slope, a wrong select, and results that alias are noticed."""
    x, anchor, advantages = tensors(EDGES)
    right = closed(F.ppo_clip, x, anchor, advantages)
    want = by_autograd(F.ppo_clip, x, anchor, advantages)
    assert distance(right, want) <= 1e-12
    assert distance((right[0], right[1] * (1 + 1e-11)), want) > 1e-12
    unclipped = closed(F.importance_sampling, x, anchor, advantages)
    assert distance((right[0], unclipped[1]), want) > 1e-12
    assert shares_memory((x, x.clone()), (x,))
    assert shares_memory((right[0], right[0]), (x,))
    assert shares_memory((right[0], right[1][:1].expand(9)), (x,))


@pytest.mark.parametrize("compute", [by_autograd, closed])
def test_edge_of_the_range_is_not_clipped(compute: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """A ratio on a bound keeps its slope, the next number outside has none: on either side, and at the dual bound."""
    step = 2.0**-52
    d = torch.tensor([-step, 0.0, step], dtype=torch.float64)
    assert d.exp().tolist() == [1 - step, 1.0, 1 + step]
    one = torch.ones_like(d)
    assert compute(F.ppo_clip, d, 0.0, one, 1.0, 1.0)[1].tolist() == [-(1 - step), -1.0, 0.0]
    assert compute(F.ppo_clip, d, 0.0, -one, 1.0, 1.0)[1].tolist() == [0.0, 1.0, 1 + step]
    assert compute(F.ppo_clip, d, 0.0, -one, 0.0, 1.0, 1.0)[1].tolist() == [1 - step, 1.0, 0.0]


@pytest.mark.parametrize("compute", [by_autograd, closed])
@pytest.mark.parametrize("size", [1.0, 1e-150, 1e-300])
def test_what_is_clipped_has_no_gradient_at_all(compute: Callable[..., tuple[Tensor, Tensor]], size: float) -> None:
    """Next to an edge too, however small the advantage; and where the sampler's probability is 0, so that no ratio is."""
    step = 2.0**-52
    near = torch.tensor([-step, step, -math.inf, math.inf], dtype=torch.float64)
    anchor = torch.where(near.isfinite(), 0.0, -near)
    x = torch.where(near.isfinite(), near, -1.0)
    sides = torch.tensor([-size, size, 0.0, size], dtype=torch.float64)
    value, slope = compute(F.ppo_clip, x[[0, 1, 3]], anchor[[0, 1, 3]], sides[[0, 1, 3]], 1.0, 1.0)
    assert slope.tolist() == [0.0, 0.0, 0.0]
    assert value.tolist() == pytest.approx([size, -size, -size], rel=1e-12, abs=0)
    value, slope = compute(F.ppo_clip, x[3:], anchor[3:], -sides[3:], 1.0, 1.0, 3.0)
    assert (value.tolist(), slope.tolist()) == ([pytest.approx(3 * size, rel=1e-12, abs=0)], [0.0])


def test_no_gradient_flows_into_anchors_and_advantages() -> None:
    """They are constants, even where they require gradients."""
    for formula in FORMULAS.values():
        x, anchor, advantages = (t.requires_grad_() for t in tensors(EDGES))
        value = formula.definition(x, *formula.arguments(anchor, advantages))
        if value.requires_grad:
            value.sum().backward()
        assert anchor.grad is None
        assert advantages.grad is None


def test_bounded_functions_at_infinity() -> None:
    """Value and slope at -inf, +inf and NaN, and a slope on the limit that is counted once."""
    at = torch.tensor([-math.inf, math.inf, 20.0, 21.0], dtype=torch.float64)
    for function, below in ((bounded_exp, 0.0), (bounded_expm1, -1.0)):
        value, slope = by_autograd(function, at)
        assert value.tolist() == pytest.approx([below, math.inf, PEAK + below, 2 * PEAK + below], rel=1e-14)
        assert slope.tolist() == pytest.approx([0.0, PEAK, PEAK, PEAK], rel=1e-14)
        assert function(torch.tensor(math.nan)).isnan()
        assert function(torch.empty(2, 0)).shape == (2, 0)


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def odds(x: float, top: float) -> float:
    inside = min(x, math.log(top))
    return inside - math.log(-math.expm1(inside)) + (x - inside) / (1.0 - top)


@given(pairs=st.lists(st.tuples(st.floats(-9, -1e-3), st.floats(-9, -1e-3)), min_size=1), e=st.floats(0, 0.49))
@example(pairs=[(-1.0, -2.0), (-2.0, -0.5), (-0.01, -3.0)], e=0.3)
def test_pair_losses_are_scalar_arithmetic(pairs: list[tuple[float, float]], e: float) -> None:
    """Values agree with the math module, and slopes with the derivatives in the docstrings."""
    c, r = (torch.tensor(column, dtype=torch.float64).requires_grad_() for column in zip(*pairs, strict=True))
    expected = {
        "dpo": lambda a, b: -log_sigmoid(0.3 * (a - b)),
        "smoothed": lambda a, b: -(1 - e) * log_sigmoid(0.3 * (a - b)) - e * log_sigmoid(-0.3 * (a - b)),
        "odds": lambda a, b: -log_sigmoid(odds(a, 0.9) - odds(b, 0.9)),
        "ratio": lambda a, b: odds(a, 0.9) - odds(b, 0.9),
        "simpo": lambda a, b: -log_sigmoid(2.5 * (a - b) - 0.7),
    }
    values = {
        "dpo": F.dpo(c, r, 0.3),
        "smoothed": F.dpo(c, r, 0.3, e),
        "odds": F.odds_ratio(c, r, 0.9),
        "ratio": F.log_odds_ratio(c, r, 0.9),
        "simpo": F.simpo(c, r, 2.5, 0.7),
    }
    for name, value in values.items():
        assert value.tolist() == pytest.approx([expected[name](*pair) for pair in pairs], rel=1e-12, abs=1e-12), name
    gain, prob = torch.sigmoid(-values["ratio"]), torch.exp(c).clamp(max=0.9)
    slopes = {
        "smoothed": 0.3 * (e * torch.sigmoid(0.3 * (c - r)) - (1 - e) * torch.sigmoid(0.3 * (r - c))),
        "odds": -gain / (1 - prob),
        "simpo": -2.5 * torch.sigmoid(0.7 - 2.5 * (c - r)),
    }
    for name, slope in slopes.items():
        (have,) = torch.autograd.grad(values[name].sum(), c, retain_graph=True)
        assert torch.allclose(have, slope, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize(("definition", "options"), PAIRS.values(), ids=PAIRS.keys())
def test_pair_losses_are_finite(definition: Callable[..., Tensor], options: tuple[float, ...]) -> None:
    """Certain and impossible responses have a finite value and gradient in fp32."""
    at = torch.tensor([-1e4, -50.0, -1.0, -1e-7, 0.0])
    chosen, rejected = (t.reshape(-1).clone().requires_grad_() for t in torch.meshgrid(at, at, indexing="ij"))
    value = definition(chosen, rejected, *options)
    assert value.isfinite().all()
    slopes = torch.autograd.grad(value.sum(), (chosen, rejected), materialize_grads=True)
    assert all(slope.isfinite().all() for slope in slopes)


def test_an_impossible_response_leaves_no_nan() -> None:
    """Where the policy excludes the rejected response, the loss of the pair is exactly 0."""
    chosen = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    loss = F.dpo(chosen, torch.tensor(-math.inf, dtype=torch.float64))
    assert (loss.item(), torch.autograd.grad(loss, chosen)[0].item()) == (0.0, 0.0)


def test_functions_without_a_closed_form_say_so() -> None:
    """closed_form_of finds what was attached, and nothing for a pair loss, whose form is of another kind."""
    assert F.closed_form_of(F.dpo) is None

    def double(x: Tensor) -> Tensor:
        return 2 * x

    @F.closed_form(double)
    def attached(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, torch.full_like(x, 2.0)

    assert F.closed_form_of(double) is attached


class Passes(TorchDispatchMode):
    """Counts the operations that go over a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in (
            torch.ops.aten.detach,
            torch.ops.aten.expand,
            torch.ops.aten._local_scalar_dense,
        ):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "usual", "most"),
    [
        ("nll", 2, 2),
        ("policy_gradient", 2, 2),
        ("importance_sampling", 7, 10),
        ("ppo_clip", 12, 15),
        ("cispo", 6, 6),
        ("dro", 6, 6),
        ("kl_penalty k3 reverse", 5, 10),
    ],
)
def test_closed_forms_pass_few_times_over_the_tokens(name: str, usual: int, most: int) -> None:
    """The price of a closed form is its number of passes over the tokens; log-ratios beyond 20, which are rare, cost more."""
    for values, limit in ((EDGES, most), ([(-3.0, 0.1, 1.0), (-0.1, -0.2, -1.0)], usual)):
        x, anchor, advantages = tensors(values)
        with Passes() as passes:
            closed(FORMULAS[name].definition, x, *FORMULAS[name].arguments(anchor, advantages))
        assert 2 <= len(passes.names) <= limit, passes.names
