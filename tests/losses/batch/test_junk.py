"""What is not trained has no effect, whatever it holds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from example_losses.loss_inputs import DEFAULTS, VARIANTS, Inputs, ids, make
from hypothesis import given
from hypothesis import strategies as st
from reads import pretend_device
from torch import Tensor

from pullback.errors import InvalidDatumsError
from pullback.losses import GRPO, KL, CrossEntropy, Loss, TokenBatch, functional
from pullback.losses.batch.values import LARGEST_LOGPROB
from pullback.losses.evaluation import token_sum

EACH = pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))
JUNK = (math.nan, math.inf, -math.inf, 1e30)
FEW = (math.nan, 1e30)  # what spreads through every sum, and what a finite sum does not show
SPOILED = ("logprobs", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")


def spoiled(inputs: Inputs, junk: float) -> Inputs:
    """Put junk wherever nothing is trained."""
    changes = {n: t.masked_fill(~inputs.trained, junk) for n, t in inputs.tensors.items() if n in SPOILED}
    return inputs.replaced(**changes)


def result(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor]:
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    value = loss.evaluate(inputs.batch(leaf)).loss
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def check(loss: Loss, inputs: Inputs, junk: float) -> None:
    """Assert that junk changes neither value nor gradient by a bit, and that its gradient is exactly 0."""
    value, gradient = result(loss, inputs)
    other, with_junk = result(loss, spoiled(inputs, junk))
    assert torch.equal(other, value)
    assert torch.equal(with_junk, gradient)
    assert bool((with_junk[~inputs.trained] == 0).all())


@EACH
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize("junk", [x if x in FEW else pytest.param(x, marks=pytest.mark.slow) for x in JUNK])
def test_junk_has_no_effect(loss: Loss, padded: bool, junk: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layout, with every kind of mask, on the CPU's own ways and on those of a device."""
    made = [make(loss, padded=padded, mask=mask, pair_ids=padded, old=True) for mask in ("float", "ones", "bool")]
    for inputs in made:
        check(loss, inputs, junk)
    with monkeypatch.context() as patch:
        pretend_device(patch)
        for inputs in made:
            check(loss, inputs, junk)


@pytest.mark.parametrize("loss", [v for v in VARIANTS if v.name == "cross_entropy"], ids=lambda x: x.aggregation.name)
@given(junk=st.sampled_from(JUNK), padded=st.booleans(), mask=st.sampled_from(["float", "bool"]))
def test_candidates(loss: Loss, junk: float, padded: bool, mask: str) -> None:
    """A candidate of weight 0 may hold anything, beside one that is trained."""
    check(loss, make(loss, padded=padded, mask=mask, candidates=3), junk)


@pytest.mark.parametrize("junk", JUNK)
def test_junk_under_transforms(junk: float) -> None:
    """Under torch.func the same selection is written another way, and holds too."""
    loss = GRPO(kl=KL())
    inputs = make(loss, padded=True)
    for each in (inputs, spoiled(inputs, junk)):

        def value(x: Tensor, each: Inputs = each) -> Tensor:
            return loss.evaluate(each.batch(x)).loss

        gradient = torch.func.grad(value)(each.tensors["logprobs"])
        torch.testing.assert_close(gradient, result(loss, inputs)[1], rtol=1e-6, atol=1e-8)
        assert bool((gradient[~inputs.trained] == 0).all())


def test_multiplying_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: where the mask multiplies, NaN gets through."""
    monkeypatch.setattr(token_sum, "select_", lambda values, weights: values if weights is None else values * weights)
    with pytest.raises(AssertionError):
        check(GRPO(), make(GRPO(), mask="ones"), math.nan)


REFUSED = (math.nan, math.inf, -math.inf, 0.02)


@pytest.mark.parametrize("loss", DEFAULTS, ids=ids(DEFAULTS))
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize("wrong", REFUSED)
def test_the_same_is_refused_where_trained(loss: Loss, padded: bool, wrong: float) -> None:
    """One trained log-prob that is not finite, or positive, is named, whatever the loss would make of it."""
    inputs = make(loss, padded=padded, mask="ones")
    inputs.tensors["logprobs"][(1, 1) if padded else 6] = wrong  # the second token of the second sequence
    with pytest.raises(InvalidDatumsError, match=r"logprobs: 1 of .* first: sequence 1, token 1 "):
        loss.evaluate(inputs.batch())


ANCHORS = ("rollout_logprobs", "old_logprobs", "ref_logprobs")
READ = [(loss, name) for loss in VARIANTS for name in ANCHORS if name in make(loss, old=True).tensors]
KINDS = {0.3: "positive", -math.inf: "infinite", math.nan: "nan"}


@pytest.mark.parametrize(("loss", "name"), READ, ids=[f"{i}-{loss.name}-{name}" for i, (loss, name) in enumerate(READ)])
def test_anchors_are_log_probs(loss: Loss, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trained anchor that is no log-prob is refused, on a device by `check`; where nothing is trained it is not.

    Of whatever sign the advantage is: a ratio to -inf is clipped, so that the loss is finite.
    """
    inputs = make(loss, mask="ones", old=True)
    inputs.tensors["weights"][7] = 1.0
    inputs.tensors[name][6] = LARGEST_LOGPROB
    loss.evaluate(inputs.batch())
    for wrong, kind in KINDS.items():
        inputs.tensors[name][6] = wrong
        message = rf"{name}: 1 of .* {kind}.* first: sequence 1, token 1 \("
        for advantage in (1.0, -1.0) if "advantages" in inputs.tensors else (0.0,):
            each = inputs.replaced(advantages=torch.full((18,), advantage)) if advantage else inputs
            with pytest.raises(InvalidDatumsError, match=message):
                loss.evaluate(each.batch())
    with monkeypatch.context() as patch:
        pretend_device(patch)
        output = loss.evaluate(inputs.batch())
        with pytest.raises(InvalidDatumsError, match=f"{name}: 1 of"):
            output.check()
    inputs.tensors["weights"][6] = 0.0
    loss.evaluate(inputs.batch())


def test_anchors_that_a_loss_does_not_read_are_not_looked_at() -> None:
    batch = make(GRPO(), mask="ones").replaced(ref_logprobs=torch.full((18,), 0.3)).batch()
    assert math.isfinite(GRPO().evaluate(batch).loss.item())
    with pytest.raises(InvalidDatumsError, match="ref_logprobs"):
        GRPO(kl=KL()).evaluate(batch)


def test_whole_numbers_are_no_anchors() -> None:
    """Token ids in the place of log-probs."""
    tokens = make(GRPO(), mask="ones").replaced(rollout_logprobs=torch.arange(18))
    with pytest.raises(InvalidDatumsError, match=r"rollout_logprobs: .* are positive"):
        GRPO().evaluate(tokens.batch())


@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, math.nan, math.inf, -math.inf]), min_size=4, max_size=40),
    untrained=st.integers(0, 3),
)
def test_wrong_values_are_counted(values: list[float], untrained: int) -> None:
    """One line for each kind that there is, with how many and the first; all of the trained ones and no other."""
    lengths = [len(values) // 2, len(values) - len(values) // 2]
    weights = [0.0] * untrained + [1.0] * (len(values) - untrained)
    batch = TokenBatch.from_packed(
        torch.tensor(values, dtype=torch.float64), lengths, weights=torch.tensor(weights, dtype=torch.float64)
    )
    tests: dict[str, Callable[[float], bool]] = {
        "nan": math.isnan,
        "infinite": math.isinf,
        "positive": lambda x: math.isfinite(x) and x > 0,
    }
    expected = []
    for kind, test in tests.items():
        found = [i for i, x in enumerate(values) if i >= untrained and test(x)]
        if found:
            row = int(found[0] >= lengths[0])
            count = (
                f"{len(found)} of {len(values) - untrained} trained values {'is' if len(found) == 1 else 'are'} {kind}"
            )
            expected.append((f"logprobs: {count}", f"first: sequence {row}, token {found[0] - row * lengths[0]} "))
    if not expected:
        assert math.isfinite(CrossEntropy().evaluate(batch).loss.item())
        return
    with pytest.raises(InvalidDatumsError) as caught:
        CrossEntropy().evaluate(batch)
    assert len(caught.value.problems) == len(expected)
    for line, (start, place) in zip(caught.value.problems, expected, strict=True):
        assert line.startswith(start)
        assert place in line


def test_many_wrong_values_are_one_line() -> None:
    """With how many there are, as people write it, and what a positive number may be."""
    batch = TokenBatch.from_padded(torch.full((64, 512), torch.nan), torch.ones(64, 512))
    with pytest.raises(InvalidDatumsError, match="32,768 of 32,768 trained values are nan") as caught:
        CrossEntropy().evaluate(batch)
    assert len(caught.value.problems) == 1
    with pytest.raises(InvalidDatumsError, match=r"\(probabilities, logits, or -logprobs\?\)"):
        CrossEntropy().evaluate(batch.with_logprobs(torch.full((64, 512), 0.3)))


def test_finite_losses_of_infinite_logprobs() -> None:
    """Why it takes a look: PPO's ratio of -inf is 0, and a margin that is infinite has a DPO loss of 0."""
    lost = torch.tensor([-math.inf], dtype=torch.float64)
    assert functional.ppo_clip(lost, -1.0, torch.ones(1)).isfinite().all()
    assert functional.dpo(-lost, lost.new_zeros(1)).isfinite().all()
