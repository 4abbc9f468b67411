"""The formulas under torch's transforms: second derivatives, vmap of grad, compilation, fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward
from oracles.formulas import (
    EDGES,
    FORMULAS,
    PAIRS,
    Formula,
    by_autograd,
    cispo,
    closed,
    distance,
    tensors,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pullback.losses import functional as F
from pullback.losses.functional.numerics import log1mexp

EACH = pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS.keys())
SMOOTH = [(-0.5, d, a) for d in (0.05, -0.1, 0.5, -0.6, 1.5) for a in (1.3, -0.7)]
SECOND = {k: f for k, f in FORMULAS.items() if f.definition is not F.cispo and not k.endswith(("reverse", "none"))}
del SECOND["gspo_token"]  # its ratio is not a function of the token's own log-prob
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


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("tokens", [EDGES, SMOOTH], ids=["edges", "smooth"])
@EACH
def test_forward_mode(formula: Formula, tokens: list[tuple[float, float, float]]) -> None:
    """The derivative that goes forwards is the closed form's slope; most of what is smooth never needs a tangent."""
    x, anchor, advantages = tensors(tokens)
    arguments = formula.arguments(anchor, advantages)
    with forward.dual_level():
        found = forward.unpack_dual(formula.definition(forward.make_dual(x, torch.ones_like(x)), *arguments)).tangent
    slope = torch.zeros_like(x) if found is None else found
    want = closed(formula.definition, x, *arguments)[1]
    assert distance((slope, slope), (want, want)) <= 1e-12


COMPILED = {"nll", "policy_gradient", "importance_sampling", "ppo_clip", "ppo_clip dual", "cispo", "cispo unbounded"}
COMPILED |= {"dro", "kl k2", "kl_penalty k3 reverse", "kl_penalty k3 pathwise", "kl_penalty k1 none"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COMPILED else pytest.mark.slow) for name in FORMULAS]
)
def test_compiles_whole(name: str) -> None:
    """Definition and closed form are one graph each, with the eager results to the bit."""
    formula = FORMULAS[name]
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
