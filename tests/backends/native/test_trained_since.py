"""What is trained is chosen when a backend is made: a gradient that would be lost, in whole or in part, is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
@pytest.mark.parametrize(
    ("change", "message"),
    [("merge_adapter", "adapter is merged into 14"), ("disable_adapter_layers", "was reached by the gradient")],
)
def test_adapter_without_effect(call: str, change: str, message: str) -> None:
    model = tiny_llama(lora=2)
    backend = TorchBackend(model)
    _require_refused(backend, getattr(model.model.base_model, change), CALLS[call], message)


def _adapted_beside_a_norm() -> Any:
    model = tiny_llama(lora=2)
    model.get_parameter("model.base_model.model.model.norm.weight").requires_grad_(True)
    return model


def test_an_adapter_merged_beside_what_is_trained() -> None:
    """The norm would be trained, and the adapter would not, without a word."""
    model = _adapted_beside_a_norm()
    _require_refused(TorchBackend(model), model.model.merge_adapter, CALLS["registered"], "adapter is merged into 14")


@pytest.mark.parametrize("operation", ["step", "load"])
def test_an_adapter_merged_before_its_weights_change(operation: str, tmp_path: Path) -> None:
    """Unmerged after a step or a load, the base would lack what was never added to it; so it is after no step."""
    model: Any = tiny_llama(lora=2)
    backend = TorchBackend(model, checkpoint_dir=tmp_path)
    path = backend.save_state("first").result().path
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}
    if operation == "step":
        backend.forward_backward(DATA, "cross_entropy").result()
    model.model.merge_adapter()
    with pytest.raises(BackendError, match="adapter is merged into 14"):
        (backend.optim_step(AdamParams()) if operation == "step" else backend.load_state(path)).result()
    model.model.unmerge_adapter()
    assert distance({name: p for name, p in model.named_parameters() if name in base}, base) < 1e-12


def test_an_adapter_merged_before_the_backend_is_made() -> None:
    model: Any = tiny_llama(lora=2)
    model.model.merge_adapter()
    with pytest.raises(BackendError, match="adapter is merged into 14"):
        TorchBackend(model)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("call", CALLS)
def test_another_dtype(call: str, lora: int) -> None:
    """In bfloat16 without fp32 masters five of six weights would not move at a small learning rate."""
    model = tiny_llama(lora=lora or None)
    backend = TorchBackend(model)
    backend.forward_backward(DATA, "cross_entropy").result()
    model.to(torch.bfloat16)
    for work in (CALLS[call], lambda backend: backend.optim_step(AdamParams(learning_rate=1e-5))):
        with pytest.raises(BackendError, match=r"have another dtype .* was torch.float64, and is torch.bfloat16"):
            work(backend).result()


def test_another_dtype_of_one_weight() -> None:
    """It is named, with what it was."""
    model = TinyLM()
    backend = TorchBackend(model)
    model.get_parameter("norm").data = model.get_parameter("norm").data.float()
    with pytest.raises(BackendError, match=r"^1 of the weights .* \(norm was torch.float64, and is torch.float32\)"):
        backend.forward_backward(DATA, "cross_entropy").result()


def test_another_dtype_of_what_is_frozen() -> None:
    """The base may be converted below its adapter: a negative control."""
    model = tiny_llama(lora=2)
    backend = TorchBackend(model)
    for name, p in model.named_parameters():
        if "lora" not in name:
            p.data = p.data.float()
    backend.forward_backward(DATA, "cross_entropy").result()


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
