"""What a loss gives back and what it reads: metrics when they are read, tokens with their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from example_losses.loss_inputs import DEFAULTS, VARIANTS, ids, make

from pullback.errors import LengthError
from pullback.losses import (
    CISPO,
    GRPO,
    GSPO,
    KL,
    PPO,
    Correction,
    CrossEntropy,
    DeferredMetric,
    Loss,
    Packed,
    TokenBatch,
    TokenTerm,
)
from pullback.losses.evaluation.streaming import select_tokens

NUMBERS = torch.linspace(-2, 2, 5, dtype=torch.float64)
BATCH = TokenBatch.from_packed(
    torch.zeros(5, dtype=torch.float64),
    [3, 2],
    weights=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]),
    advantages=NUMBERS,
    rollout_logprobs=-NUMBERS.abs(),
    ref_logprobs=NUMBERS - 3,
)


WEIGHTED = [
    *VARIANTS,
    GRPO(kl=KL("k2"), correction=Correction.tis(1.1)),
    PPO(correction=Correction.icepop(0.9, 1.2)),
    CISPO(correction=Correction.tis(level="sequence", normalize="sequences")),
    GSPO(0.2, "sequence_mean", "sequence"),
]


def added_up(loss: Loss, batch: TokenBatch) -> list[float]:
    """``scale sum_u c_u w_u value_u`` of each term, from the values that the loss gives out."""
    values, sums = loss.evaluate(batch).values, []
    for term in loss.terms(batch):
        value = values[term.name].double()
        if value.shape == batch.logprobs.shape:
            rows = term.aggregation.row_coefficients(batch)
            value = value * batch.weight * (1.0 if rows is None else batch.layout.spread(rows, value.dim()))
        sums.append(float(value.sum()) * term.scale * term.aggregation.constant)
    return sums


@pytest.mark.parametrize("loss", WEIGHTED, ids=ids(WEIGHTED))
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_values_make_the_loss(loss: Loss, padded: bool) -> None:
    """The unreduced values, weighted and added up, are the numerators: a weight of a correction is in them."""
    inputs = make(loss, padded=padded, old=True, dtype=torch.float64)
    if "advantages" in inputs.tensors:  # one for each sequence, as the sequence form has it
        inputs = inputs.replaced(advantages=torch.full_like(inputs.tensors["advantages"], -0.75))
    batch = inputs.batch()
    assert added_up(loss, batch) == pytest.approx([p.numerator.item() for p in loss.evaluate(batch).parts], rel=1e-12)


@pytest.mark.parametrize("loss", WEIGHTED, ids=ids(WEIGHTED))
def test_unit(loss: Loss) -> None:
    """A loss says what it has one value of; a raw sum is normalised by the number of these."""
    batch = make(loss, padded=True, old=True).batch()
    if batch.advantages is not None:
        batch = replace(batch, advantages=torch.full_like(batch.logprobs, 0.5))
    values = loss.evaluate(batch).values
    found = {values[term.name].shape for term in loss.terms(batch) if term.aggregation == loss.main_aggregation}
    assert found == {{"token": batch.logprobs.shape, "sequence": (4,), "pair": (2,)}[loss.unit]}


def test_values_without_the_weight_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: values from which the correction is missing do not add up."""
    values = TokenTerm.values
    monkeypatch.setattr(TokenTerm, "values", lambda term, batch: values(replace(term, factor=None), batch))
    with pytest.raises(AssertionError):
        test_values_make_the_loss(GRPO(correction=Correction.tis(1.1)), padded=True)


def test_metrics_are_computed_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """evaluate describes nothing; the first reading does, once, after the backward too, and leaves gradients alone."""
    calls: list[bool] = []
    describe = GRPO.describe

    def counted(self: GRPO, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        calls.append(batch.logprobs.requires_grad or torch.is_grad_enabled())
        return describe(self, batch)

    monkeypatch.setattr(GRPO, "describe", counted)
    leaf = torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True)
    output = GRPO(kl=KL()).evaluate(BATCH.with_logprobs(leaf * 1.0))
    output.deferred()
    torch.autograd.backward(output.loss)
    assert leaf.grad is not None
    before = leaf.grad.clone()
    assert calls == []
    assert output.metrics["kl_ref"].denominator == 4
    assert output.metrics["ratio"] is output.metrics["ratio"]
    assert calls == [False]
    assert torch.equal(leaf.grad, before)


@pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))
@pytest.mark.parametrize("mask", ["float", "bool"])
def test_metrics_of_a_loss_that_is_divided_in_place(loss: Loss, mask: str) -> None:
    """``loss /= 4``, as accumulation has it, divides the gradient and no metric, also where a sum of one term is the loss."""
    inputs = make(loss, mask=mask)
    leaf = inputs.tensors["logprobs"].requires_grad_()
    plain, divided = loss.evaluate(inputs.batch()), loss.evaluate(inputs.batch())
    found = divided.loss
    found /= 4
    assert dict(divided.metrics) == dict(plain.metrics)
    for whole, quarter in zip(
        *(torch.autograd.grad(each, leaf)[0].tolist() for each in (plain.loss, found)), strict=True
    ):
        assert quarter == pytest.approx(whole / 4, rel=1e-6)


def test_a_metric_that_fails_costs_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A broken description is logged and counted, not raised."""
    monkeypatch.setattr(PPO, "describe", lambda *_: 1 / 0)
    output = PPO().evaluate(BATCH)
    assert output.metrics["metrics_failed"].value == 1
    assert "metrics of ppo" in caplog.text


def test_tokens_are_selected_with_their_inputs() -> None:
    """A chunk has the inputs of its own tokens and the sequences they belong to."""
    chunk = select_tokens(BATCH, torch.tensor([1, 2, 4]))
    assert isinstance(chunk.layout, Packed)
    assert chunk.layout.offsets.tolist() == [0, 2, 3]
    assert chunk.layout.index.tolist() == [0, 0, 1]
    assert chunk.trained.tolist() == [False, True, True]
    assert chunk.advantages is not None
    assert chunk.advantages.tolist() == [-1, 0, 2]
    again = Packed(chunk.logprobs.shape, chunk.layout.offsets)
    assert again.index.tolist() == chunk.layout.index.tolist()


def test_other_logprobs_other_dtype() -> None:
    """with_logprobs keeps what is known of the masks, but not the weights' old dtype; another shape is refused."""
    assert BATCH.weight.dtype == torch.float64
    assert BATCH.with_logprobs(torch.zeros(5)).weight.dtype == torch.float32
    with pytest.raises(LengthError, match="logprobs"):
        BATCH.with_logprobs(torch.zeros(4))


def test_candidates_share_their_tokens_coefficient() -> None:
    """With K targets per token each is weighted on its own, and divided by the trained tokens of its sequence."""
    weights = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 0.0], [0.25, 2.0]], dtype=torch.float64)
    leaf = torch.full((4, 2), -1.0, dtype=torch.float64, requires_grad=True)
    batch = TokenBatch.from_packed(leaf, [3, 1], weights=weights)
    (gradient,) = torch.autograd.grad(CrossEntropy("sequence_mean_token_mean").evaluate(batch).loss, leaf)
    per_token = torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)  # trained tokens of the token's sequence
    assert torch.allclose(gradient, -weights / per_token[:, None] / 2, rtol=1e-12, atol=0)


WRITTEN = [
    (loss, name) for loss in [*DEFAULTS, *WEIGHTED[-6:]] for name in make(loss, old=True).tensors if name != "logprobs"
]


@pytest.mark.parametrize(("loss", "name"), WRITTEN, ids=[f"{i}-{x.name}-{n}" for i, (x, n) in enumerate(WRITTEN)])
def test_new_inputs_in_the_same_memory(loss: Loss, name: str) -> None:
    """A batch whose inputs were written over is what a new one of the same numbers is: no count of the old ones is kept."""
    inputs = make(loss, padded=True, old=True, pair_ids=True)
    if "advantages" in inputs.tensors:
        inputs = inputs.replaced(advantages=torch.full_like(inputs.tensors["advantages"], 0.5))
    batch = inputs.batch()
    loss.evaluate(batch)
    loss.counts([batch])
    written = inputs.tensors[name]
    written.copy_({"weights": 3 * written, "role": 1 - written, "label": 1 - written}.get(name, written * 0.75 - 0.01))
    if name in ("group_id", "reference_point", "pair_id"):
        written.copy_(torch.arange(4).flip(0) // 2)
    if name == "weights":
        written[:, 1:3] = 1.0
    new = inputs.batch()
    assert loss.counts([batch]) == loss.counts([new])
    assert loss.evaluate(batch).loss.item() == loss.evaluate(new).loss.item()


def test_new_numbers_in_the_same_memory() -> None:
    """A batch may be evaluated again after its log-probs were written over: nothing of the old ones is remembered."""
    weights = torch.tensor([[0.0, 1.0, 1.0]])
    buffer = torch.full((1, 3), -1.0)
    batch = TokenBatch.from_padded(buffer, weights)
    before = CrossEntropy().evaluate(batch)
    buffer.copy_(torch.tensor([[torch.nan, -2.0, -3.0]]))
    after = CrossEntropy().evaluate(batch)
    assert (before.loss.item(), after.loss.item()) == (2.0, 5.0)
    assert before.metrics["nll"].numerator == 2.0
