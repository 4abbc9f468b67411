"""KTO: the formula in plain arithmetic, its reference point, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import plain_metrics
from torch import Tensor

from pullback.backends import AdamParams, FakeBackend, TorchBackend, with_reference, with_reference_point
from pullback.datums import Datum, ModelInput, datum_from_prompt_completion, mismatched
from pullback.errors import ConfigError, DatumError, InvalidDatumsError, MissingFieldError
from pullback.losses import KTO, TokenBatch
from pullback.losses import functional as F
from pullback.testing import Case, TinyLM, cotangent, example_datums, loss_report
from pullback.testing.strategies import cases

FAR = [-1e4, -800.0, -40.0, -1.0, 0.0, 1e-9, 1.0, 40.0, 800.0, 1e4]
RATIOS = st.lists(st.floats(-60, 60), max_size=20)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def plain(h: float, label: int, point: float, beta: float, weights: tuple[float, float]) -> tuple[float, float]:
    """Value and slope of one response."""
    toward, weight = (1.0, weights[0]) if label else (-1.0, weights[1])
    z = toward * beta * (h - point)
    return weight * sigmoid(-z), -toward * weight * beta * sigmoid(z) * sigmoid(-z)


@given(ratios=RATIOS, beta=st.floats(0.01, 3), weights=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)))
@example(ratios=[], beta=0.1, weights=(1.3, 0.7))
def test_scalar_arithmetic(ratios: list[float], beta: float, weights: tuple[float, float]) -> None:
    """Value and slope, by autograd and in closed form, are those of the math module for both labels, far away too."""
    ratios = [*ratios, *FAR]
    for label in (0, 1):
        h = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
        rest: tuple[Any, ...] = (torch.full((len(ratios),), label), 0.3, beta, *weights)
        value = F.kto(h, *rest)
        (slope,) = torch.autograd.grad(value.sum(), h)
        form = F.closed_form_of(F.kto)
        assert form is not None
        want = [plain(x, label, 0.3, beta, weights) for x in ratios]
        for found in ((value, slope), form(h.detach(), *rest)):
            for have, column in zip(found, zip(*want, strict=True), strict=True):
                assert have.tolist() == pytest.approx(list(column), rel=1e-11, abs=1e-300)


def test_the_closed_form_is_fresh() -> None:
    """It may be overwritten: it shares memory with neither input nor the other result."""
    form = F.closed_form_of(F.kto)
    assert form is not None
    h, labels = torch.tensor([0.1, 0.2]), torch.tensor([1, 0])
    value, slope = form(h, labels, torch.zeros(2))
    value.fill_(7.0)
    assert (slope != 7.0).all()
    assert h.tolist() == pytest.approx([0.1, 0.2])


def test_at_the_reference_point() -> None:
    """Value 1/2 and slope beta / 4 for each label, whatever the reference point is; it saturates on both sides of it."""
    h = torch.tensor([0.7, 0.7], dtype=torch.float64, requires_grad=True)
    value = F.kto(h, torch.tensor([1, 0]), 0.7, 0.2)
    assert value.tolist() == [0.5, 0.5]
    assert torch.autograd.grad(value.sum(), h)[0].tolist() == pytest.approx([-0.05, 0.05])
    far = torch.tensor([500.0, -500.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.kto(far, torch.tensor([0, 1]), 0.7, 0.2).sum(), far)
    assert 0 < slope[0] < 1e-40
    assert -1e-40 < slope[1] < 0


def test_reference_point() -> None:
    """The mean log-ratio, at least 0 and without a gradient; not the mean of what is cut off one by one."""
    ratios = torch.tensor([3.0, -1.0], requires_grad=True)
    assert F.reference_point(ratios) == 1.0
    assert not F.reference_point(ratios).requires_grad
    assert F.reference_point(-ratios) == 0.0


@given(case=cases(empty=True))
def test_metrics(case: Case) -> None:
    """Rewards by label, the mean reference point and the share of desirable answers, of those that count."""
    output, _ = cotangent(KTO(0.3), case)
    counted = [s for s in case.sequences if s.trained()]
    rewards = {
        label: [
            0.3 * math.fsum(s.weights[j] * (s.logprobs[j] - s.ref_logprobs[j]) for j in s.trained())
            for s in counted
            if s.label == label
        ]
        for label in (0, 1)
    }
    want = {
        "reward_desirable": plain_metrics.average(rewards[1]),
        "reward_undesirable": plain_metrics.average(rewards[0]),
        "reference_point": plain_metrics.average([s.reference_point for s in counted]),
        "desirable": plain_metrics.average([float(s.label) for s in counted]),
    }
    for name, number in want.items():
        assert output.metrics[name].value == pytest.approx(number, rel=1e-9, abs=1e-12, nan_ok=True), name


def batch(leaf: Tensor, **inputs: Tensor) -> TokenBatch:
    """Two answers, of two and one token."""
    given = {
        "weights": torch.ones(3),
        "ref_logprobs": torch.full((3,), -1.2),
        "label": torch.tensor([1, 0]),
        "reference_point": torch.zeros(2),
    }
    return TokenBatch.from_packed(leaf, [2, 1], **{**given, **inputs})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"label": torch.tensor([1, 2])}, r"sequence 1: label is 2; it is 1 \(desirable\) or 0"),
        ({"reference_point": torch.tensor([-0.1, 0.0])}, "sequence 0: reference_point is -0.1; it is a KL"),
        ({"reference_point": torch.tensor([math.nan, math.inf])}, "sequence 1: reference_point is inf"),
    ],
)
def test_refused(inputs: dict[str, Tensor], words: str) -> None:
    """By sequence; but not at a sequence of which nothing is trained, where they have no effect."""
    leaf = torch.full((3,), -1.0)
    with pytest.raises(InvalidDatumsError, match=words):
        KTO().evaluate(batch(leaf, **inputs))
    KTO().evaluate(batch(leaf, weights=torch.zeros(3), **inputs))


def test_what_is_missing_is_said() -> None:
    """Without a reference point the loss does not take 0 for it, unless it is told to."""
    leaf = torch.full((3,), -1.0)
    plain_batch = TokenBatch.from_packed(leaf, [2, 1], label=torch.tensor([1, 0]), ref_logprob_sums=-torch.ones(2))
    with pytest.raises(MissingFieldError, match="missing input 'reference_point': kto needs it"):
        KTO().evaluate(TokenBatch.from_packed(leaf, [2, 1], **_inputs(plain_batch)))
    KTO(baseline="zero").evaluate(TokenBatch.from_packed(leaf, [2, 1], **_inputs(plain_batch)))
    with pytest.raises(ConfigError, match="baseline"):
        KTO(baseline="batch")  # type: ignore[arg-type]
    data = [datum.with_inputs(reference_point=[-1.0], label=[3]) for datum in example_datums([3, 4])]
    with pytest.raises(InvalidDatumsError) as caught:
        FakeBackend().forward_backward(data, "kto").result()
    assert [p.split(";")[0] for p in caught.value.problems[:2]] == [
        "datum 0: 'label' is [3]",
        "datum 0: 'reference_point' is -1",
    ]


def _inputs(given: TokenBatch) -> dict[str, Tensor | None]:
    return {"weights": torch.ones(3), "label": given.label, "ref_logprob_sums": given.ref_logprob_sums}


def test_a_sum_is_divided_by_sequences() -> None:
    """There is one value for each answer, so a raw sum is not divided by tokens."""
    assert KTO(aggregation="sum").normalization == "num_sequences"
    assert KTO().normalization is None


def test_all_properties() -> None:
    """Those that ask for inputs that KTO does not have are left out; no other is."""
    report = loss_report(KTO(), examples=6)
    assert not report.failed, str(report)
    skipped = {result.property for result in report.results if result.verdict == "not applicable"}
    assert skipped == {"closed_form", "pairs_by_id", "scale", "connected"}


TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=2, max_size=5))
def test_mismatched(rows: list[tuple[list[int], list[int]]]) -> None:
    """Each prompt is followed by the answer of the row before; nothing of the prompt is trained, and all of the answer is."""
    found = mismatched([datum_from_prompt_completion(*row) for row in rows])
    want = [datum_from_prompt_completion(rows[i][0], rows[i - 1][1]) for i in range(len(rows))]
    assert found == want


def test_mismatched_keeps_masks_and_lengths() -> None:
    """Untrained tokens within an answer stay untrained; an answer is cut on the right, a prompt never."""
    tool = Datum(ModelInput.from_ints([1, 2, 3, 4]), {"target_tokens": [2, 3, 4, 5], "weights": [0.0, 1.0, 0.0, 0.5]})
    one = datum_from_prompt_completion([7], [8])
    assert mismatched([tool, one])[1].loss_fn_inputs["weights"].data == [1.0, 0.0, 0.5]
    assert mismatched([tool, one], max_length=2)[1].model_input.to_ints() == [7, 3]
    for data, words in (
        ([one], "two datums or more, got 1"),
        ([one, one.with_inputs(weights=[0.0])], "datum 1: no token is trained"),
        ([Datum(ModelInput.from_ints([1, 2]), {}), one], "datum 0: an answer is one target token"),
    ):
        with pytest.raises(DatumError, match=words):
            mismatched(data)


ROWS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9]), ([2, 2], [3]), ([9, 8], [1, 1, 1, 1])]


def labelled() -> list[Datum]:
    return [datum_from_prompt_completion(*row).with_inputs(label=[i % 2]) for i, row in enumerate(ROWS)]


def test_measured_on_a_model() -> None:
    """z0 is what the models themselves say of the mismatched answers, and a step in one call is that in four."""
    policy, reference = TinyLM(seed=4), TinyLM(seed=3)
    backend = TorchBackend(policy, reference=TinyLM(seed=3))
    data = with_reference(labelled(), backend.reference())
    data = with_reference_point(data, backend, backend.reference())
    ratios = []
    for datum in mismatched(data):
        kept = datum.loss_fn_inputs["weights"].to_torch() != 0
        both = [_scored(model, datum)[kept].sum() for model in (policy, reference)]
        ratios.append(float(both[0] - both[1]))
    want = max(0.0, math.fsum(ratios) / len(ratios))
    assert [d.loss_fn_inputs["reference_point"].data[0] for d in data] == pytest.approx([want] * 4, rel=1e-6)
    assert want > 0, "the models must differ so that this tells something"
    updates = []
    for calls in ([data], [[datum] for datum in data]):
        trained = TorchBackend(TinyLM(seed=4))
        for call in calls:
            trained.forward_backward(call, "kto").result()
        updates.append({name: gradient.clone() for name, gradient in trained.gradients().items()})
        trained.optim_step(AdamParams()).result()
    assert all(torch.allclose(updates[0][name], updates[1][name], rtol=1e-9, atol=1e-15) for name in updates[0])


@torch.no_grad()
def _scored(model: TinyLM, datum: Datum) -> Tensor:
    tokens = datum.model_input.tokens
    logits = model.hidden_states(tokens[None], torch.arange(len(tokens))[None])[0] @ model.unembedding.T
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def test_where_the_reference_point_comes_from() -> None:
    """A plan names what would fill it in."""
    backend = TorchBackend(TinyLM(), reference=TinyLM())
    data = with_reference(labelled(), backend.reference())
    reason = backend.plan("kto", data).reason
    assert "with_reference_point(data, backend, backend.reference())" in reason
    assert "with_reference(data, backend.reference())" in backend.plan("kto", labelled()).reason
