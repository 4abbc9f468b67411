"""Weights that a loss depends on beside the log-probs, or that change while a forward waits: a wrong gradient is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_llama
from torch import Tensor

from pullback.backends import TorchBackend
from pullback.errors import BackendError, LossError
from pullback.testing import TinyLM

DATA = make_data([6, 4])
Result = tuple[Tensor, dict[str, float]]


def likelihood(data: Sequence[Any], logprobs: Sequence[Tensor]) -> Result:
    return -torch.cat(list(logprobs)).sum(), {}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def penalised(penalty: Callable[[], Tensor]) -> Callable[..., Result]:
    return lambda data, logprobs: (likelihood(data, logprobs)[0] + penalty(), {})


def norm_of(model: torch.nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in model.parameters()]).sum()


def test_a_penalty_on_the_weights_is_refused() -> None:
    """Its gradient would be lost: the term is in the loss, and trains nothing. What had accumulated stays."""
    model = TinyLM()
    backend = TorchBackend(model)
    backend.forward_backward_custom(DATA, likelihood).result()
    before = gradients(model)
    with pytest.raises(LossError, match=r"depends on the weight .* beside the log-probs"):
        backend.forward_backward_custom(DATA, penalised(lambda: norm_of(model))).result()
    retained = {backend.forward_retain(DATA).result(): [0, 1]}
    with pytest.raises(LossError, match="weight_decay"):
        backend.backward(retained, DATA, penalised(lambda: norm_of(model))).result()
    assert distance(gradients(model), before) == 0.0


def test_constants_and_other_models_are_not_refused() -> None:
    """A penalty without a gradient, and a teacher whose weights ask for one, change nothing but the loss."""
    model, teacher = TinyLM(), TinyLM(seed=1)
    backend = TorchBackend(model)
    backend.forward_backward_custom(DATA, likelihood).result()
    want = gradients(model)

    def without_gradient() -> Tensor:
        with torch.no_grad():
            return norm_of(model)

    for penalty in (without_gradient, lambda: norm_of(teacher)):
        backend.discard_gradients()
        backend.forward_backward_custom(DATA, penalised(penalty)).result()
        assert distance(gradients(model), want) == 0.0


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_weights_that_change_in_place_while_a_forward_waits(factor: float) -> None:
    """The gradient would be of neither the old weights nor the new ones; a product with 1 is a change, too."""
    model = tiny_llama()
    backend = TorchBackend(model)
    retained = backend.forward_retain(DATA).result()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "down_proj" in name:
                weight.mul_(factor)
    with pytest.raises(BackendError, match="changed in place since the forward"):
        backend.backward({retained: [0, 1]}, DATA, "cross_entropy").result()
    assert not gradients(model)


def test_weights_that_stay() -> None:
    """Negative control: without the change the retained forward serves, and gives the gradient of a call."""
    model = tiny_llama()
    backend = TorchBackend(model)
    retained = backend.forward_retain(DATA).result()
    backend.backward({retained: [0, 1]}, DATA, "cross_entropy").result()
    found = gradients(model)
    backend.discard_gradients()
    backend.forward_backward(DATA, "cross_entropy").result()
    assert distance(found, gradients(model)) <= 1e-6
