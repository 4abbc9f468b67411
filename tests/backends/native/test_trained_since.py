"""What is trained is chosen when a backend is made: a gradient that would be lost, in whole or in part, is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_llama, weights_of
from torch import nn

from pullback.backends import AdamParams, TorchBackend
from pullback.errors import BackendError
from pullback.testing import TinyLM

DATA = make_data([6, 4])
Call = Callable[[TorchBackend], Any]


def _retained(backend: TorchBackend) -> Any:
    return backend.backward({backend.forward_retain(DATA).result(): [0, 1]}, DATA, "cross_entropy")


CALLS: dict[str, Call] = {
    "registered": lambda backend: backend.forward_backward(DATA, "cross_entropy"),
    "custom": lambda backend: backend.forward_backward_custom(
        DATA, lambda data, lps: (lps[0].sum() + lps[1].sum(), {})
    ),
    "retained": _retained,
}


def _require_refused(backend: TorchBackend, change: Callable[[], object], call: Call, message: str) -> None:
    """Check that a call after the change is refused, and that what had accumulated is kept."""
    trained = {name: p for name, p in backend.model.named_parameters() if p.requires_grad}
    backend.forward_backward(DATA[:1], "cross_entropy").result()
    before = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    change()
    with pytest.raises(BackendError, match=message):
        call(backend).result()
    after = {name: p.grad for name, p in trained.items() if p.grad is not None}
    assert distance(after, before) == 0.0


@pytest.mark.parametrize("call", CALLS)
def test_unfrozen(call: str) -> None:
    model = TinyLM()
    first = next(iter(model.parameters())).requires_grad_(False)
    _require_refused(TorchBackend(model), first.requires_grad_, CALLS[call], "this backend does not train them")


@pytest.mark.parametrize("call", CALLS)
def test_replaced(call: str) -> None:
    model = tiny_llama()
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))

    def replace() -> None:
        layer.weight = nn.Parameter(layer.weight.detach().clone())

    _require_refused(TorchBackend(model), replace, CALLS[call], "this backend does not train them")


@pytest.mark.parametrize("call", CALLS)
def test_nothing_left(call: str) -> None:
    model = TinyLM()
    _require_refused(
        TorchBackend(model), lambda: model.requires_grad_(False), CALLS[call], "was reached by the gradient"
    )


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", ["merge_adapter", "disable_adapter_layers"])
def test_adapter_without_effect(call: str, change: str) -> None:
    model = tiny_llama(lora=2)
    backend = TorchBackend(model)
    _require_refused(backend, getattr(model.model.base_model, change), CALLS[call], "was reached by the gradient")


@pytest.mark.parametrize("call", CALLS)
def test_another_adapter(call: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama(lora=2)
    adapted: Any = model.model
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.set_adapter("default")
    backend = TorchBackend(model)
    _require_refused(backend, lambda: adapted.set_adapter("other"), CALLS[call], "this backend does not train them")


def test_frozen_since() -> None:
    """Weights that are frozen later stay where they are, and the others are trained: a negative control."""
    model = TinyLM()
    backend = TorchBackend(model)
    names = list(dict(model.named_parameters()))
    model.get_parameter(names[0]).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backend.forward_backward(DATA, "cross_entropy").result()
    backend.optim_step(AdamParams(weight_decay=0.1)).result()
    assert torch.equal(model.get_parameter(names[0]), before[names[0]])
    assert distance(weights_of(backend), {name: before[name] for name in names[1:]}) > 0
