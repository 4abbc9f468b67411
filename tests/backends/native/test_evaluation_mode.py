"""Dropout is off in every operation, whatever mode the model was put into between them or by the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_llama
from torch import Tensor, nn

from pullback import ModelInput
from pullback.backends import HFModel, SamplingParams, TorchBackend

DATA = make_data([6, 4, 5])
PROMPT = [ModelInput.from_ints([1, 2, 3])]


def _model(**options: Any) -> HFModel:
    model = tiny_llama(**options)
    for layer in _attention(model):
        layer.attention_dropout = 0.5
    return model


def _attention(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "attention_dropout")]


def _train(model: nn.Module) -> None:
    model.train()


def _train_one_layer(model: nn.Module) -> None:
    _attention(model)[-1].train()


def _logprobs(outputs: Sequence[Any]) -> dict[str, Tensor]:
    return {str(i): output["logprobs"].to_torch() for i, output in enumerate(outputs)}


def _loss_gradient(backend: TorchBackend) -> dict[str, Tensor]:
    backend.forward_backward(DATA, "cross_entropy").result()
    return {name: p.grad.clone() for name, p in backend.model.named_parameters() if p.grad is not None}


def _retained(backend: TorchBackend) -> dict[str, Tensor]:
    retained = backend.forward_retain(DATA).result()
    return {str(i): x for i, x in enumerate(retained.logprobs)}


def _sampled(backend: TorchBackend) -> dict[str, Tensor]:
    (rollout,) = backend.sample(PROMPT, 1, SamplingParams(max_tokens=6, seed=0)).result()
    return {"logprobs": torch.tensor(rollout.logprobs), "tokens": torch.tensor(rollout.tokens).double()}


OPERATIONS: dict[str, Callable[[TorchBackend], dict[str, Tensor]]] = {
    "forward": lambda backend: _logprobs(backend.forward(DATA).result().loss_fn_outputs),
    "gradient": _loss_gradient,
    "retain": _retained,
    "reference": lambda backend: _logprobs(backend.reference().forward(DATA).result().loss_fn_outputs),
    "sample": _sampled,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("change", [_train, _train_one_layer])
def test_between_operations(operation: str, change: Callable[[nn.Module], None]) -> None:
    """What follows is what it would have been, of policy and reference, and the model is left in evaluation mode."""
    models = [_model() for _ in range(4)]
    kept, put = (TorchBackend(model, reference=frozen) for model, frozen in (models[:2], models[2:]))
    change(models[2])
    change(models[3])
    assert distance(OPERATIONS[operation](put), OPERATIONS[operation](kept)) == 0.0
    assert not any(module.training for module in models[2].modules())


@pytest.mark.parametrize("options", [{}, {"token_budget": 6, "activation_budget": 0}])
def test_by_the_loss(options: dict[str, Any]) -> None:
    """A layer that runs again in the backward runs in evaluation mode."""

    def gradient(change: Callable[[HFModel], object]) -> dict[str, Tensor]:
        model = _model(gradient_checkpointing=True)

        def loss(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
            change(model)
            return torch.stack([x.square().sum() for x in logprobs]).sum(), {}

        TorchBackend(model, **options).forward_backward_custom(DATA, loss).result()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert distance(gradient(_train), gradient(lambda model: None)) == 0.0


def test_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A change of mode is logged, and none is where none was needed."""
    backend = TorchBackend(_model())
    backend.forward(DATA).result()
    assert "training mode" not in caplog.text
    backend.model.train()
    backend.forward(DATA).result()
    assert "HFModel was in training mode" in caplog.text
