"""Losses by their names through the official SDK: every registered one, and those that the protocol has as sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clients.tinker_sdk import DATA, read_by, trainer
from helpers import distance
from servers import SDK_WARNINGS, served, twin
from torch import Tensor

from pullback.datums import Datum, to_tinker
from pullback.losses import loss_names
from pullback.service import ServedModels

pytestmark = SDK_WARNINGS


@pytest.mark.parametrize("loss", loss_names())
def test_every_registered_loss_by_name(service: Any, models: ServedModels, loss: str) -> None:
    """The gradient and the value are the native ones, whatever is registered."""
    client = trainer(service)
    native = twin(models, client)
    result = client.forward_backward(to_tinker(read_by(loss)), loss).result()
    expected = native.forward_backward(DATA, loss).result()
    assert result.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    assert distance(served(models, client).gradients(), native.gradients()) < 1e-5


def _ratio(datum: Datum, logprobs: Tensor) -> Tensor:
    return (logprobs - datum.loss_fn_inputs["logprobs"].to_torch()).exp()


def _whole(datum: Datum, logprobs: Tensor) -> Tensor:
    """The geometric mean of the trained tokens' ratios, for each token."""
    mean = _ratio(datum, logprobs).log()[_input(datum, "weights") != 0].mean()
    return mean.exp().expand(logprobs.shape)


def _input(datum: Datum, key: str) -> Tensor:
    return datum.loss_fn_inputs[key].to_torch()


# The protocol's own formulas: sums over tokens, never averaged.
SUMS: dict[str, Callable[[Datum, Tensor], Tensor]] = {
    "cross_entropy": lambda d, lp: -lp,
    "importance_sampling": lambda d, lp: -_ratio(d, lp) * _input(d, "advantages"),
    "ppo": lambda d, lp: (
        -torch.minimum(_ratio(d, lp) * _input(d, "advantages"), _ratio(d, lp).clamp(0.8, 1.2) * _input(d, "advantages"))
    ),
    "cispo": lambda d, lp: -_ratio(d, lp).clamp(0.0, 5.0) * _input(d, "advantages") * lp,
    "dro": lambda d, lp: 0.025 * (lp - _input(d, "logprobs")).square() - _input(d, "advantages") * lp,
    "gspo": lambda d, lp: (
        -torch.minimum(
            _whole(d, lp) * _input(d, "advantages"), _whole(d, lp).clamp(1 - 3e-4, 1 + 4e-4) * _input(d, "advantages")
        )
    ),
}


@pytest.mark.parametrize("loss", SUMS)
def test_the_protocols_own_names_are_sums(service: Any, models: ServedModels, loss: str) -> None:
    """From the log-probs that come back; and two calls give twice the gradient of one."""
    client = trainer(service)
    wire = to_tinker(read_by(loss))
    result = client.forward_backward(wire, loss).result()
    once = served(models, client).gradients()
    expected = 0.0
    for datum, output in zip(DATA, result.loss_fn_outputs, strict=True):
        trained = _input(datum, "weights") != 0
        logprobs = torch.as_tensor(output["logprobs"].to_torch())
        expected += float((SUMS[loss](datum, logprobs) * _input(datum, "weights"))[trained].double().sum())
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    client.forward_backward(wire, loss).result()
    twice = served(models, client).gradients()
    assert distance(twice, {name: 2 * gradient for name, gradient in once.items()}) < 1e-6
