"""Gradients that something else has changed are not stepped on: another backend on the model, zero_grad, a backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import distance, make_data, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pullback.backends import AdamParams, Future, TorchBackend
from pullback.errors import BackendError
from pullback.testing import TinyLM

DATA, OTHERS = make_data([6, 4]), make_data([5, 3], seed=1)
PARAMS = AdamParams(learning_rate=1e-2)
Change = Callable[[nn.Module, TorchBackend], object]


def _trained_by_another(model: nn.Module, other: TorchBackend) -> None:
    other.discard_gradients()
    other.forward_backward(OTHERS, "cross_entropy").result()


def _backward(model: nn.Module, other: TorchBackend) -> None:
    model.zero_grad()
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]


def _backward_on_top(model: nn.Module, other: TorchBackend) -> None:
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]


def _clip(model: nn.Module, other: TorchBackend) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


CHANGES: dict[str, Change] = {
    "another backend is made": lambda model, other: TorchBackend(model),
    "another backend forgets": lambda model, other: other.discard_gradients(),
    "another backend trains": _trained_by_another,
    "zero_grad": lambda model, other: model.zero_grad(),
    "a backward of one's own": _backward,
    "a backward that adds to what is there": _backward_on_top,
    "gradients clipped in place": _clip,
}


@pytest.mark.parametrize("name", CHANGES)
@settings(max_examples=4)
@given(before=st.integers(1, 2), operation=st.sampled_from(["step", "retained", "call"]))
def test_changed_gradients(name: str, before: int, operation: str) -> None:
    """Neither a step nor another call goes on; after discard_gradients() all is as on a model of one's own."""
    model, alone = TinyLM(), TorchBackend(TinyLM())
    backend, other = TorchBackend(model), TorchBackend(model)
    for _ in range(before):
        backend.forward_backward(DATA, "cross_entropy").result()
    forward = backend.forward_retain(DATA).result()
    CHANGES[name](model, other)
    operations: dict[str, Callable[[], Future[Any]]] = {
        "step": lambda: backend.optim_step(PARAMS),
        "retained": lambda: backend.backward({forward: range(len(DATA))}, DATA, "cross_entropy"),
        "call": lambda: backend.forward_backward(DATA, "cross_entropy"),
    }
    with pytest.raises(BackendError, match="is not the one that has accumulated here"):
        operations[operation]().result()
    backend.discard_gradients()
    for each in (backend, alone):
        each.forward_backward(DATA, "cross_entropy").result()
        each.optim_step(PARAMS).result()
    assert distance(weights_of(backend), weights_of(alone)) == 0.0


def test_taking_turns_is_allowed() -> None:
    """Two backends on one model that step before the other begins; and copies may be looked at, and changed."""
    model = TinyLM()
    for backend in [TorchBackend(model), TorchBackend(model)] * 2:
        backend.forward_backward(DATA, "cross_entropy").result()
        for gradient in backend.gradients().values():
            gradient.zero_()
        assert backend.optim_step(PARAMS).result().metrics["grad_norm"] > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
