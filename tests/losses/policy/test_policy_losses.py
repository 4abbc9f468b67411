"""GSPO in both forms, the protocol's names, and how much a new loss takes."""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from example_losses.loss_cases import IDS, LOSSES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pullback.errors import ConfigError, DatumError, EmptyUnitError, MissingFieldError, UnknownLossError
from pullback.losses import (
    CISPO,
    DPO,
    DRO,
    GRPO,
    GSPO,
    ORPO,
    PPO,
    ClipRange,
    Loss,
    Registry,
    SimPO,
    TokenBatch,
    get_loss,
    loss_names,
)
from pullback.losses.registry import REFUSED
from pullback.testing import Case, CaseSequence, cotangent, oracles
from pullback.testing.strategies import cases

MEAN = "sequence_mean_token_mean"


def even(case: Case) -> Case:
    """The case with one advantage in each sequence."""

    def same(s: CaseSequence) -> CaseSequence:
        first = s.advantages[s.trained()[0]]
        return replace(s, advantages=[first if w else a for a, w in zip(s.advantages, s.weights, strict=True)])

    return replace(case, sequences=tuple(same(s) for s in case.sequences))


def sequence_form(epsilon: float, aggregation: str = "sequence_mean") -> GSPO:
    return GSPO(epsilon, aggregation, "sequence")


@given(case=cases(), epsilon=st.floats(0.01, 0.9))
def test_sequence_form(case: Case, epsilon: float) -> None:
    """Value and gradient of the sequence form are those of scalar loops."""
    case = even(case)
    for aggregation in ("sum", "sequence_mean"):
        loss = sequence_form(epsilon, aggregation)
        output, found = cotangent(loss, case)
        low, high = 1 - epsilon, 1 + epsilon
        rows = oracles.gspo(case, aggregation, "sequence", low, high)
        want = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
        assert torch.allclose(torch.cat(found), want, rtol=1e-12, atol=1e-14)
        total = 0.0
        for s in case.sequences:
            anchor = s.old_logprobs if case.with_old else s.rollout_logprobs
            at, a = s.trained(), s.advantages[s.trained()[0]]
            ratio = math.exp(math.fsum(s.logprobs[j] - anchor[j] for j in at) / len(at))
            weight = math.fsum(s.weights) / len(at)
            total += weight * max(-ratio * a, -min(max(ratio, low), high) * a)
        total /= len(case.sequences) if aggregation == "sequence_mean" else 1
        assert math.isclose(output.loss.item(), total, rel_tol=1e-12, abs_tol=1e-12)


@given(case=cases(), epsilon=st.floats(0.01, 0.9))
def test_forms_agree(case: Case, epsilon: float) -> None:
    """With one advantage and unit weights the averaged token form has value and gradient of the averaged sequence form."""
    case = even(case)
    batch, leaf = case.batch()
    units = {"weights": batch.trained, "advantages": batch.advantages, "rollout_logprobs": batch.rollout_logprobs}
    lengths = [len(s.weights) for s in case.sequences]
    results = []
    for loss in (GSPO(epsilon, MEAN), sequence_form(epsilon)):
        output = loss.evaluate(TokenBatch.from_packed(leaf, lengths, **units))
        results.append((output.loss.item(), torch.autograd.grad(output.loss, leaf)[0]))
    assert math.isclose(results[0][0], results[1][0], rel_tol=1e-12, abs_tol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12, atol=1e-14)


@given(case=cases())
def test_one_token_is_ppo(case: Case) -> None:
    """Sequences of one token have that token's ratio."""
    batch, leaf = case.batch()
    rows = [1] * len(leaf)
    inputs = {
        "weights": batch.weights,
        "advantages": batch.advantages,
        "rollout_logprobs": batch.rollout_logprobs,
    }
    losses = (GSPO(0.2), PPO(0.2))
    one, other = [
        torch.autograd.grad(loss.evaluate(TokenBatch.from_packed(leaf, rows, **inputs)).loss, leaf)[0]
        for loss in losses
    ]
    assert torch.allclose(one, other, rtol=1e-12, atol=0)


def three_tokens(**inputs: Any) -> tuple[TokenBatch, Tensor]:
    """One sequence of three tokens, of which the second has drifted far."""
    leaf = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    known = {
        "weights": torch.ones(3),
        "advantages": torch.ones(3),
        "rollout_logprobs": torch.tensor([-1.0, -4.0, -1.0]),
    }
    return TokenBatch.from_packed(leaf, [3], **{**known, **inputs}), leaf


@pytest.mark.parametrize("form", ["token", "sequence"])
def test_ratio_mask(form: Any) -> None:
    """A ratio is taken over the tokens of its mask; outside of them only the token form has a gradient."""
    loss = GSPO(ClipRange(0.5, 9.0), form=form)
    batch, leaf = three_tokens()
    (whole,) = torch.autograd.grad(loss.evaluate(batch).loss, leaf)
    each = 1 if form == "token" else 3
    assert torch.allclose(whole, torch.full_like(whole, -math.e / each))
    batch, leaf = three_tokens(sequence_ratio_mask=torch.tensor([1.0, 0.0, 1.0]))
    output = loss.evaluate(batch)
    (some,) = torch.autograd.grad(output.loss, leaf)
    assert some.tolist() == pytest.approx([-1.0, -1.0, -1.0] if form == "token" else [-0.5, 0.0, -0.5])
    assert output.metrics["sequence_ratio"].value == pytest.approx(1.0)
    batch, leaf = three_tokens(sequence_ratio_mask=torch.tensor([-1.0, 0.0, 0.5]))  # what is not 0 is in the mask
    assert torch.equal(torch.autograd.grad(loss.evaluate(batch).loss, leaf)[0], some)


def test_what_gspo_refuses() -> None:
    """Differing advantages, ratios over nothing or over untrained tokens, and prompts in a ratio."""
    batch, _ = three_tokens(advantages=torch.tensor([1.0, 1.0, 0.5]))
    with pytest.raises(DatumError, match="form='token'"):
        sequence_form(0.2).evaluate(batch)
    GSPO(0.2).evaluate(batch)
    untrained, _ = three_tokens(advantages=torch.tensor([1.0, 1.0, 0.5]), weights=torch.tensor([1.0, 1.0, 0.0]))
    sequence_form(0.2).evaluate(untrained)
    with pytest.raises(EmptyUnitError, match="no ratio"):
        GSPO().evaluate(three_tokens(sequence_ratio_mask=torch.zeros(3))[0])
    last = torch.tensor([0.0, 0.0, 1.0])
    for mask in (torch.ones(3), 1.0 - 2.0 * last):
        with pytest.raises(DatumError, match="weight 0"):
            GSPO().evaluate(three_tokens(sequence_ratio_mask=mask, weights=1.0 - last)[0])
    with pytest.raises(EmptyUnitError, match="no ratio"):  # that it is not trained as well is said next
        GSPO().evaluate(three_tokens(sequence_ratio_mask=last, weights=1.0 - last)[0])
    with pytest.raises(MissingFieldError, match="sequence_ratio_mask"):
        GSPO().evaluate(three_tokens(weights=None)[0])
    with pytest.raises(ConfigError, match="one value per sequence"):
        sequence_form(0.2, "token_mean")
    with pytest.raises(ConfigError, match="above the clip range"):
        GSPO(0.2, dual_clip=1.1)


@pytest.mark.parametrize(("first", "second", "equal"), [(100.0, 100.00001, True), (0.01, 0.01001, False)])
def test_advantages_are_equal_up_to_rounding(first: float, second: float, equal: bool) -> None:
    """Relative to their size: the sequence form takes what differs by 1e-7, and refuses what differs by 1e-3."""
    batch, _ = three_tokens(advantages=torch.tensor([first, second, first], dtype=torch.float64))
    if equal:
        sequence_form(0.2).evaluate(batch)
    else:
        with pytest.raises(DatumError, match="form='token'"):
            sequence_form(0.2).evaluate(batch)


def test_what_a_ratio_mask_must_cover() -> None:
    """A sequence of one trained token too; but not one of which nothing is trained."""
    leaf = torch.tensor([-1.0, -1.1], dtype=torch.float64)
    known = {
        "advantages": torch.ones(2),
        "rollout_logprobs": -torch.ones(2),
        "sequence_ratio_mask": torch.tensor([1.0, 0.0]),
    }
    GSPO().evaluate(TokenBatch.from_packed(leaf, [1, 1], weights=torch.tensor([1.0, 0.0]), **known))
    with pytest.raises(EmptyUnitError, match="no ratio"):
        GSPO().evaluate(TokenBatch.from_packed(leaf, [1, 1], weights=torch.ones(2), **known))


@pytest.mark.parametrize("loss", [SimPO(), ORPO()], ids=["simpo", "orpo"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, -2.0]])
def test_a_response_needs_a_positive_weight(loss: Loss, weights: list[float]) -> None:
    """Weights that cancel, or are less than nothing, give no mean log-prob; those of a small sum do."""
    leaf = torch.tensor([-1.0, -1.1, -0.9, -2.0], dtype=torch.float64)
    for size in (1.0, 0.25):
        with pytest.raises(EmptyUnitError, match=r"sequences \[1\] lack it"):
            loss.evaluate(TokenBatch.from_packed(leaf, [2, 2], weights=size * torch.tensor(weights)))
    with pytest.raises(EmptyUnitError, match="no trained token"):
        loss.evaluate(TokenBatch.from_packed(leaf, [2, 2], weights=torch.tensor([1.0, 1.0, 0.0, 0.0])))


@pytest.mark.parametrize("rate", [-0.1, 0.5, 0.6, 1.0])
def test_half_of_the_labels_or_more_cannot_be_flipped(rate: float) -> None:
    """Of half the labels say nothing; of more the others would be the right ones."""
    with pytest.raises(ConfigError, match="label_smoothing"):
        DPO(label_smoothing=rate)


def test_an_empty_sequence_counts_nothing() -> None:
    """A sequence without a trained token gives neither form a value or a gradient."""
    lengths, weights = [2, 1], torch.tensor([1.0, 1.0, 0.0])
    for loss in (GSPO(0.2, MEAN), sequence_form(0.2)):
        leaf = torch.tensor([-1.0, -1.1, math.nan], dtype=torch.float64, requires_grad=True)
        inputs = {"weights": weights, "advantages": torch.ones(3), "rollout_logprobs": -torch.ones(3)}
        output = loss.evaluate(TokenBatch.from_packed(leaf, lengths, **inputs))
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        assert output.loss.item() == pytest.approx(-math.exp(-0.05))
        assert gradient[2] == 0.0
        assert output.parts[0].count == 1.0


@pytest.mark.parametrize(
    ("name", "config", "loss"),
    [
        ("cispo", {}, CISPO(ClipRange(0.0, 5.0))),
        ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, CISPO(ClipRange(0.8, 1.2))),
        ("gspo", {}, GSPO(ClipRange.from_epsilon(3e-4, 4e-4))),
        ("gspo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}, GSPO(ClipRange(0.8, 1.28))),
        ("dro", {"beta": 0.01}, DRO(0.01)),
        ("ppo", {"dual_clip": 3.0}, PPO(dual_clip=3.0)),
        ("simpo", {"beta": 2.5, "gamma": 1.2}, SimPO(2.5, 1.2)),
    ],
)
def test_names_and_keys(name: str, config: dict[str, float], loss: Loss) -> None:
    """The protocol's names and keys build these losses; its policy losses are sums."""
    assert get_loss(name, config) == loss
    assert loss.main_aggregation.is_mean is (name == "simpo")


def test_stable_reinforce_is_refused() -> None:
    """A name without a public formula says so, unless somebody registers it."""
    with pytest.raises(UnknownLossError, match="formula is not public"):
        get_loss("stable_reinforce")
    assert not set(REFUSED) & set(loss_names())
    mine = Registry()
    parts = {"aggregation": "sum", "gradient_kind": "batch", "required_inputs": (), "terms": lambda self, batch: ()}
    mine.register(type("Mine", (Loss,), {"name": "stable_reinforce", **parts}))
    assert mine.names() == ("stable_reinforce",)
    assert mine.get("stable_reinforce").name == "stable_reinforce"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_nothing_is_read_from_a_device(loss: Loss, packed: bool) -> None:
    """Loss, gradient and metrics of tensors that have no numbers: whoever looks at one fails."""

    def empty() -> Tensor:
        return torch.empty((8,) if packed else (2, 4), device="meta")

    inputs = {name: empty() for name in ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")}
    leaf = empty().requires_grad_()
    rows = 2
    inputs |= {
        "label": torch.empty(rows, device="meta", dtype=torch.int64),
        "reference_point": torch.empty(rows, device="meta"),
    }
    if packed:
        batch = TokenBatch.from_packed(leaf, [4, 4], weights=empty(), **inputs)
    else:
        batch = TokenBatch.from_padded(leaf, empty(), **inputs)
    loss.evaluate(batch).loss.backward()
    assert leaf.grad is not None
    assert loss.describe(batch) is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(leaf.sum())


def statements(module: object) -> int:
    """Lines of a module that are code: no blank, comment, docstring or import."""
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.Import, ast.ImportFrom)):
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            inside = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            last = node.body[0].lineno - 1 if inside else node.end_lineno  # type: ignore[attr-defined]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            lines |= set() if text else set(range(first, (node.lineno if inside else last or first) + 1))
    return len(lines)


def test_a_new_loss_takes_forty_lines() -> None:
    """SimPO, checks, problems, metrics and config keys included, is at most 40 lines of code."""
    module = inspect.getmodule(SimPO)
    assert 10 < statements(module) <= 40
    assert statements(module) < statements(inspect.getmodule(GRPO)) < statements(inspect.getmodule(inspect))
