"""fp16: gradients that half precision cannot hold on their way through the model arrive all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pullback.backends import TorchBackend
from pullback.backends.native.execution.scaling import GradientScale

DATA = make_data([6, 3, 5, 4])


def scaled(factors: Sequence[float]) -> Any:
    """A sum of log-probs whose datums have these cotangents."""

    def loss(data: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return -torch.stack([f * x.sum() for f, x in zip(factors, logprobs, strict=True)]).sum(), {}

    return loss


def gradients(dtype: torch.dtype, loss: Any, **options: Any) -> dict[str, Tensor]:
    backend = TorchBackend(tiny_llama(dtype), **options)
    backend.forward_backward_custom(DATA, loss).result()
    return doubled(backend.gradients())


def doubled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


@settings(max_examples=8)
@given(exponents=st.lists(st.floats(-9, 0), min_size=4, max_size=4))
def test_any_size_of_cotangent(exponents: list[float]) -> None:
    """From 1e-9 to 1, mixed in one call: the relative error is what fp16 has anyway."""
    loss = scaled([10.0**e for e in exponents])
    assert distance(gradients(torch.float16, loss), gradients(torch.float64, loss)) < 0.03


@settings(max_examples=8)
@given(exponents=st.lists(st.floats(-9, 0), min_size=4, max_size=4), retained=st.booleans())
def test_any_size_of_cotangent_under_autocast(exponents: list[float], retained: bool) -> None:
    """fp32 weights that autocast computes with in fp16, also where the backward is made outside of autocast."""
    loss, backend = scaled([10.0**e for e in exponents]), TorchBackend(tiny_llama(torch.float32))
    with torch.autocast("cpu", dtype=torch.float16):
        if retained:
            forward = backend.forward_retain(DATA).result()
        else:
            backend.forward_backward_custom(DATA, loss).result()
    if retained:
        backend.backward({forward: range(len(DATA))}, DATA, loss).result()
    assert distance(doubled(backend.gradients()), gradients(torch.float64, loss)) < 0.03


@pytest.mark.parametrize("order", [[1e-8, 1e-8, 1.0, 1.0], [1.0, 1.0, 1e-8, 1e-8]])
def test_a_later_batch_lowers_the_factor(order: list[float]) -> None:
    """Batches that are streamed one by one have the gradient of one batch, whichever comes first."""
    data = [d.with_inputs(weights=[w] * len(d.model_input)) for d, w in zip(DATA, order, strict=True)]
    found = {}
    for dtype in (torch.float16, torch.float64):
        backend = TorchBackend(tiny_llama(dtype), token_budget=6)
        for _ in range(2):
            backend.forward_backward(data, "cross_entropy").result()
        found[dtype] = doubled(backend.gradients())
    assert distance(found[torch.float16], found[torch.float64]) < 0.03


def test_without_it_they_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    loss = scaled([1e-8] * 4)
    exact = gradients(torch.float64, loss)
    monkeypatch.setattr(GradientScale, "choose", lambda self, cotangents: 1.0)
    assert distance(gradients(torch.float16, loss), exact) > 0.5


def test_the_factor_is_a_power_of_two_and_only_for_fp16() -> None:
    """It costs no precision, and other dtypes need none."""
    tiny: Mapping[int, Tensor] = {0: torch.tensor([3e-7, 0.0])}
    scale, other = GradientScale([], needed=True), GradientScale([], needed=False)
    assert scale.choose(tiny) == 2.0**21
    assert scale.choose({0: torch.tensor([0.3])}) == 2.0
    assert scale.choose({0: torch.zeros(2)}) == 2.0
    assert other.choose(tiny) == 1.0
