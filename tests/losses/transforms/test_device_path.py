"""On a device nothing is read: evaluate and backward never wait, metrics and check wait once, problems are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from example_losses.loss_inputs import DEFAULTS, VARIANTS, Inputs, ids, make
from reads import CountedReads, ForbiddenReads, pretend_device
from torch import Tensor

from pullback.errors import InvalidDatumsError, PullbackError
from pullback.losses import DPO, GRPO, ORPO, PPO, CrossEntropy, Loss, LossOutput, TokenBatch

EACH = pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU are treated as if they were on a device."""
    with monkeypatch.context() as patch:
        pretend_device(patch)
        yield


def settings(loss: Loss) -> Iterator[Inputs]:
    """Yield inputs in each layout and mask, with pairs by id and without, with an anchor of its own and without."""
    for padded in (True, False):
        for mask in ("float", "bool"):
            yield make(loss, padded=padded, mask=mask, pair_ids=padded, old=not padded)
    if loss.name == "cross_entropy":
        yield make(loss, padded=True, candidates=3)
        yield make(loss, candidates=3)


def result(loss: Loss, inputs: Inputs, mode: Any = None) -> tuple[LossOutput, Tensor]:
    """Evaluate and differentiate under a mode."""
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    with mode or nullcontext():
        output = loss.evaluate(inputs.batch(leaf))
        (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, gradient


@EACH
def test_nothing_is_read(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient need no look at any value, and equal those of the CPU's own ways."""
    for inputs in settings(loss):
        plain, expected = result(loss, inputs)
        with monkeypatch.context() as patch, CountedReads() as reads:
            pretend_device(patch)
            output, gradient = result(loss, inputs, ForbiddenReads())
        assert reads.count == 0
        torch.testing.assert_close(output.loss, plain.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


@EACH
def test_another_device_by_default(loss: Loss) -> None:
    """Tensors stay where they are, whatever device new ones are made on: nothing is made on it."""
    for inputs in settings(loss):
        batch = inputs.batch(inputs.tensors["logprobs"].clone().requires_grad_())
        plain = loss.evaluate(batch)
        totals = loss.counts([batch])
        (expected,) = torch.autograd.grad(plain.loss, batch.logprobs)
        with torch.device("meta"):
            outputs = loss.evaluate(batch), loss.evaluate(batch, totals)
            found = [torch.autograd.grad(output.loss, batch.logprobs)[0] for output in outputs]
            metrics = [dict(output.metrics) for output in outputs]
        assert all(torch.equal(gradient, expected) for gradient in found)
        assert all(each.keys() == plain.metrics.keys() for each in metrics)


@pytest.mark.parametrize("loss", DEFAULTS, ids=ids(DEFAULTS))
def test_metrics_and_check_are_one_transfer_each(loss: Loss, device: None) -> None:
    """All metrics come over together, and so does the answer that all is well; the metrics are the CPU's."""
    for inputs in settings(loss):
        output, _ = result(loss, inputs)
        with CountedReads() as reads:
            found = dict(output.metrics)
        assert reads.count == 1
        with CountedReads() as reads:
            output.check()
        assert reads.count == 1
        assert "metrics_failed" not in found


@pytest.mark.parametrize("loss", DEFAULTS, ids=ids(DEFAULTS))
def test_metrics_are_the_same(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every metric of a device is that of the CPU."""
    for inputs in settings(loss):
        expected = result(loss, inputs)[0].metrics
        with monkeypatch.context() as patch:
            pretend_device(patch)
            found = result(loss, inputs)[0].metrics
        assert set(found) == set(expected)
        for name, metric in expected.items():
            assert math.isclose(found[name].value, metric.value, rel_tol=1e-5, abs_tol=1e-6), name


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.masked_select(t > 0),
        lambda t: bool((t > 0).any()),
        lambda t: torch.unique(t),
        lambda t: t.repeat_interleave((t > 0).long()),
    ],
)
def test_reads_are_noticed(read: Callable[[Tensor], Any]) -> None:
    """Negative control: each way to look at a value is forbidden."""
    with pytest.raises(AssertionError, match="reads a value"), ForbiddenReads():
        read(torch.ones(3))
    with CountedReads() as reads:
        torch.ones(3).tolist()
        float(torch.ones(()))
    assert reads.count == 2


def pairs(**changes: Any) -> Inputs:
    """Two pairs by id, with something changed."""
    inputs = make(DPO(), pair_ids=True, lengths=(2, 2, 2, 2), mask="ones")
    return inputs.replaced(**{name: torch.tensor(value) for name, value in changes.items()})


PROBLEMS: dict[str, tuple[Loss, Callable[[], TokenBatch], dict[str, float] | None]] = {
    "a pair of four": (DPO(), lambda: pairs(pair_id=[1, 1, 1, 1]).batch(), None),
    "two chosen": (ORPO(), lambda: pairs(role=[1, 1, 1, 0]).batch(), None),
    "half pairs": (DPO(), lambda: pairs(pair_id=[1, 2, 3, 4]).batch(), None),
    "empty response": (DPO(), lambda: pairs(weights=[1.0] * 6 + [0.0] * 2).batch(), None),
    "empty response of ORPO": (ORPO(), lambda: pairs(weights=[0.0] * 2 + [1.0] * 6).batch(), None),
    "weightless response": (ORPO(), lambda: pairs(weights=[-1.0] * 2 + [1.0] * 6).batch(), None),
    "labels": (CrossEntropy(), lambda: pairs(weights=[-100, 5] * 4).batch(), None),
    "weights that cancel": (CrossEntropy("weighted_mean"), lambda: pairs(weights=[1.0, -1.0] * 4).batch(), None),
    "negative weights": (CrossEntropy("weighted_mean"), lambda: pairs(weights=[-1.0] * 8).batch(), None),
    "too few tokens": (CrossEntropy("token_mean"), lambda: pairs(weights=[1.0] * 8).batch(), {"tokens": 7.0}),
    "too few pairs": (DPO(), lambda: pairs(weights=[1.0] * 8).batch(), {"pairs": 1.0}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU refuses at once is a NaN loss on a device, and `check` raises the very same error."""
    loss, made, counts = PROBLEMS[name]

    def evaluate() -> LossOutput:
        batch = made()
        given = {k: torch.tensor(v, dtype=torch.float64) for k, v in (counts or {}).items()} or None
        return loss.evaluate(batch.with_logprobs(batch.logprobs.requires_grad_()), given)

    with pytest.raises(PullbackError) as at_once:
        evaluate()
    with monkeypatch.context() as patch:
        pretend_device(patch)
        with ForbiddenReads():
            output = evaluate()
        assert math.isnan(output.loss.item())
        with pytest.raises(type(at_once.value)) as later:
            output.check()
    assert str(later.value) == str(at_once.value)


@pytest.mark.parametrize("loss", [CrossEntropy("token_mean"), PPO(), GRPO(kl=0.1), DPO(), ORPO()], ids=lambda x: x.name)
@pytest.mark.parametrize("padded", [True, False])
def test_trained_nan_is_loud(loss: Loss, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN at a trained token is refused on the CPU by sequence and token; on a device the loss is NaN."""
    inputs = make(loss, padded=padded)
    logprobs = inputs.tensors["logprobs"]
    logprobs[(1, 1) if padded else 6] = math.nan  # the second token of the second sequence
    with pytest.raises(InvalidDatumsError, match=r"logprobs: 1 of .* is nan.* first: sequence 1, token 1 "):
        loss.evaluate(inputs.batch())
    with monkeypatch.context() as patch:
        pretend_device(patch)
        output, gradient = result(loss, inputs)
        assert math.isnan(output.loss.item())
        assert bool((gradient[~inputs.trained] == 0).all())
        with pytest.raises(InvalidDatumsError, match=r"logprobs: 1 of .* is nan.* first: sequence 1, token 1 "):
            output.check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@EACH
def test_cuda_never_waits(loss: Loss) -> None:
    """With every synchronising call of CUDA an error, evaluate and backward run, and agree with the CPU."""
    for inputs in settings(loss):
        _, expected = result(loss, inputs)
        there = inputs.mapped(lambda name, tensor: tensor.cuda())
        leaf = there.tensors["logprobs"].clone().requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = loss.evaluate(there.batch(leaf))
            (gradient,) = torch.autograd.grad(output.loss, leaf)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        output.check()
        torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-5, atol=1e-6)
