"""Every formula against scalar arithmetic, every closed form against autograd, and both under torch's transforms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pullback.losses import functional as F
from pullback.losses.functional.numerics import bounded_exp, bounded_expm1, log1mexp

LIMIT, PEAK = 20.0, math.exp(20.0)


class Formula(NamedTuple):
    """A formula of tokens: what it takes after the log-probs, and its value and slope in plain arithmetic."""

    definition: Callable[..., Tensor]
    takes: str  # of "anchor" and "advantages", in this order
    options: tuple[Any, ...]
    scalar: Callable[[float, float, float], tuple[float, float]]  # logprob, log-ratio, advantage

    def arguments(self, anchor: Tensor, advantages: Tensor) -> tuple[Any, ...]:
        tensors = {"anchor": anchor, "advantages": advantages}
        return (*(tensors[name] for name in self.takes.split()), *self.options)


def ratio(d: float) -> float:
    return math.exp(d) if d <= LIMIT else PEAK * (d - LIMIT + 1.0)


def rise(d: float) -> float:
    """Derivative of `ratio`."""
    return math.exp(min(d, LIMIT))


def ppo(low: float, high: float, dual: float = math.inf) -> Callable[[float, float, float], tuple[float, float]]:
    def scalar(_: float, d: float, a: float) -> tuple[float, float]:
        r = ratio(d)
        if a > 0 and r > high:
            return -high * a, 0.0
        if a < 0 and r < low:
            return -low * a, 0.0
        return (-dual * a, 0.0) if a < 0 and r > dual else (-r * a, -rise(d) * a)

    return scalar


def cispo(low: float, high: float) -> Callable[[float, float, float], tuple[float, float]]:
    def scalar(x: float, d: float, a: float) -> tuple[float, float]:
        weight = min(max(ratio(d), low), high)
        return -weight * a * x, -weight * a

    return scalar


def k3(d: float) -> float:
    return (math.expm1(-d) if d >= -LIMIT else PEAK * (1.0 - d - LIMIT) - 1.0) + d


VALUES: dict[str, Callable[[float], float]] = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": k3, "abs": abs}
SLOPES: dict[str, Callable[[float], float]] = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: -math.expm1(min(-d, LIMIT)),
    "abs": lambda d: math.copysign(1.0, d) if d else 0.0,
}
GRADIENTS: dict[str, Callable[[str, float], float]] = {
    "reverse": lambda estimator, d: d,
    "pathwise": lambda estimator, d: SLOPES[estimator](d),
    "none": lambda estimator, d: 0.0,
}


def penalty(estimator: str, gradient: str) -> Callable[[float, float, float], tuple[float, float]]:
    return lambda x, d, a: (VALUES[estimator](d), GRADIENTS[gradient](estimator, d))


FORMULAS = {
    "nll": Formula(F.nll, "", (), lambda x, d, a: (-x, -1.0)),
    "policy_gradient": Formula(F.policy_gradient, "advantages", (), lambda x, d, a: (-a * x, -a)),
    "importance_sampling": Formula(F.importance_sampling, "anchor advantages", (), ppo(0.0, math.inf)),
    "ppo_clip": Formula(F.ppo_clip, "anchor advantages", (), ppo(0.8, 1.2)),
    "ppo_clip above": Formula(F.ppo_clip, "anchor advantages", (0.0, 1.28), ppo(0.0, 1.28)),
    "ppo_clip wide": Formula(F.ppo_clip, "anchor advantages", (0.5, 2 * PEAK), ppo(0.5, 2 * PEAK)),
    "ppo_clip dual": Formula(F.ppo_clip, "anchor advantages", (0.8, 1.2, 3.0), ppo(0.8, 1.2, 3.0)),
    "cispo": Formula(F.cispo, "anchor advantages", (), cispo(0.0, 1.2)),
    "cispo range": Formula(F.cispo, "anchor advantages", (0.5, 5.0), cispo(0.5, 5.0)),
    "cispo unbounded": Formula(F.cispo, "anchor advantages", (0.0, math.inf), cispo(0.0, math.inf)),
    "dro": Formula(
        F.dro, "anchor advantages", (0.3,), lambda x, d, a: (0.15 * d * d - a * x, 0.3 * d - a)
    ),
    **{f"kl {e}": Formula(F.kl, "anchor", (e,), penalty(e, "pathwise")) for e in VALUES},
    **{
        f"kl_penalty {e} {g}": Formula(F.kl_penalty, "anchor", (e, g), penalty(e, g))
        for e, g in itertools.product(VALUES, GRADIENTS)
    },
}  # fmt: skip
EACH = pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS.keys())

LOG_RATIOS = [
    0.0,
    1e-9,
    -0.1,
    0.3,
    math.log(0.8),
    math.log(1.2),
    math.log(3.0),
    20.0,
    -20.0,
    20.5,
    -25.0,
    90.0,
    -1e4,
    1e4,
]
LOG_RATIOS += [math.nextafter(x, side) for x in LOG_RATIOS[4:9] for side in (-math.inf, math.inf)]
ADVANTAGES = [0.0, -0.0, 1.0, -1.0, 2.5, -1e-3, 1e-300, -1e-300]
EDGES = list(itertools.product([-0.5], LOG_RATIOS, ADVANTAGES))
TOKENS = st.tuples(
    st.floats(-50, 0) | st.just(-1e4), st.floats(-1.5, 1.5) | st.floats(-50, 50), st.floats(-3, 3) | st.just(0.0)
)


def tensors(tokens: list[tuple[float, float, float]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Log-probs, anchors and advantages."""
    rows = [(x, x - d, a) for x, d, a in tokens]
    return tuple(torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True))


def by_autograd(definition: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Value and slope of a definition."""
    x = x.detach().clone().requires_grad_()
    value = definition(x, *arguments)
    if not value.requires_grad:
        return value, torch.zeros_like(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def closed(definition: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Value and slope by the closed form."""
    found = F.closed_form_of(definition)
    assert found is not None
    return found(x, *arguments)


def distance(have: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """Largest difference of values or slopes, relative where they are above 1."""
    pairs = [(a.double(), b.double()) for a, b in zip(have, want, strict=True)]
    return max(float(((a - b).abs() / b.abs().clamp(min=1.0)).max()) for a, b in pairs)


def shares_memory(results: tuple[Tensor, Tensor], inputs: tuple[Any, ...]) -> bool:
    """True if a result aliases the other, an input or itself."""
    held = [t.untyped_storage().data_ptr() for t in (*results, *inputs) if isinstance(t, Tensor)]
    itself = any(0 in t.stride() and t.numel() > 1 for t in results)
    return itself or len({*held[:2]} - {*held[2:]}) < 2


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
    assert have[0].dtype == have[1].dtype == torch.float32
    assert distance(have, by_autograd(formula.definition, wide[0], *formula.arguments(*wide[1:]))) <= 1e-6


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


PAIRS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "dpo": (F.dpo, (0.3,)),
    "dpo smoothed": (F.dpo, (0.3, 0.1)),
    "log_odds_ratio": (F.log_odds_ratio, (0.9,)),
    "odds_ratio": (F.odds_ratio, (0.9,)),
    "simpo": (F.simpo, (2.5, 0.7)),
}


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def odds(x: float, top: float) -> float:
    inside = min(x, math.log(top))
    return inside - math.log(-math.expm1(inside)) + (x - inside) / (1.0 - top)


@given(pairs=st.lists(st.tuples(st.floats(-9, -1e-3), st.floats(-9, -1e-3)), min_size=1), e=st.floats(0, 0.49))
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
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (chosen, rejected)))


SMOOTH = [(-0.5, d, a) for d in (0.05, -0.1, 0.5, -0.6, 1.5) for a in (1.3, -0.7)]
SECOND = {k: f for k, f in FORMULAS.items() if f.definition is not F.cispo and not k.endswith(("reverse", "none"))}
SECOND["cispo"] = Formula(
    F.cispo, "anchor advantages", (1.0, 1.0), cispo(1.0, 1.0)
)  # a weight that does not depend on x


@pytest.mark.parametrize("formula", SECOND.values(), ids=SECOND.keys())
def test_second_derivatives(formula: Formula) -> None:
    """First and second derivatives are those of finite differences, away from the edges."""
    x, anchor, advantages = tensors(SMOOTH)
    arguments = formula.arguments(anchor, advantages)
    assert torch.autograd.gradcheck(lambda t: formula.definition(t, *arguments), x.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda t: formula.definition(t, *arguments), x)


@pytest.mark.parametrize(("definition", "options"), PAIRS.values(), ids=PAIRS.keys())
def test_second_derivatives_of_pairs(definition: Callable[..., Tensor], options: tuple[float, ...]) -> None:
    """The same of pair losses, in both arguments."""
    pairs = [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in ([-0.5, -3.0], [-1.5, -0.9])]
    assert torch.autograd.gradcheck(lambda a, b: definition(a, b, *options), pairs)
    assert torch.autograd.gradgradcheck(lambda a, b: definition(a, b, *options), pairs)


@EACH
def test_vmap_of_grad(formula: Formula) -> None:
    """torch.func's derivative, token by token, is the closed form's slope."""
    x, anchor, advantages = tensors(EDGES)
    slope = torch.func.vmap(torch.func.grad(lambda t, at, a: formula.definition(t, *formula.arguments(at, a))))(
        x, anchor, advantages
    )
    want = closed(formula.definition, x, *formula.arguments(anchor, advantages))[1]
    assert distance((slope, slope), (want, want)) <= 1e-12


@EACH
def test_compiles_whole(formula: Formula) -> None:
    """Definition and closed form are one graph each, with the eager results to the bit."""
    x, anchor, advantages = tensors(EDGES)
    arguments = formula.arguments(anchor, advantages)
    torch._dynamo.reset()
    compiled = torch.compile(formula.definition, fullgraph=True, backend="eager")
    for a, b in zip(by_autograd(compiled, x, *arguments), by_autograd(formula.definition, x, *arguments), strict=True):
        assert torch.equal(a, b)

    def both(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return closed(formula.definition, x, *arguments)

    results = torch.compile(both, fullgraph=True, backend="eager")(x, *arguments)
    for a, b in zip(results, both(x, *arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("definition", "options"), PAIRS.values(), ids=PAIRS.keys())
def test_pair_losses_compile_whole(definition: Callable[..., Tensor], options: tuple[float, ...]) -> None:
    """A pair loss is one graph, and vmap of its gradient is the gradient."""
    torch._dynamo.reset()
    chosen, rejected = torch.tensor([-0.5, -3.0, -1e-6]), torch.tensor([-1.5, -0.9, -2.0])
    eager = by_autograd(definition, chosen, rejected, *options)
    compiled = torch.compile(definition, fullgraph=True, backend="eager")
    assert torch.equal(by_autograd(compiled, chosen, rejected, *options)[1], eager[1])
    slope = torch.func.vmap(torch.func.grad(lambda a, b: definition(a, b, *options)))(chosen, rejected)
    assert torch.allclose(slope, eager[1], rtol=1e-6)


def test_fake_tensors() -> None:
    """Nothing reads a value: every formula, forward, backward and closed form, runs on tensors that have none."""
    with FakeTensorMode():
        for formula in FORMULAS.values():
            arguments = formula.arguments(torch.empty(2, 3), torch.empty(2, 1))
            for results in (by_autograd, closed):
                value, slope = results(formula.definition, torch.empty(2, 3), *arguments)
                assert value.shape == slope.shape == (2, 3)
        for definition, options in PAIRS.values():
            assert by_autograd(definition, torch.empty(3), torch.empty(3), *options)[1].shape == (3,)
        assert by_autograd(log1mexp, torch.empty(3))[1].shape == (3,)


def test_functions_without_a_closed_form_say_so() -> None:
    """closed_form_of finds what was attached, and nothing for a pair loss."""
    assert F.closed_form_of(F.dpo) is None

    def double(x: Tensor) -> Tensor:
        return 2 * x

    @F.closed_form(double)
    def attached(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, torch.full_like(x, 2.0)

    assert F.closed_form_of(double) is attached
