"""Backends with one planted difference each, for tests of `pullback.testing.diff`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback.backends import FakeBackend, Gradient, Head, PreparedCall, TorchBackend
from pullback.testing import TinyLM

Scores = Callable[[list[Tensor], PreparedCall], list[Tensor]]
Change = Callable[[Tensor, PreparedCall, int], Tensor]


class TableLM(nn.Module):
    """The fake backend's table as a module: the hidden state of a token is its row of logits, and the head the identity."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.register_buffer("identity", torch.eye(len(table), dtype=table.dtype))

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.table[tokens]

    def head(self) -> Head:
        identity: Any = self.identity
        return Head(identity)


def scoring(change: Scores) -> FakeBackend:
    """A table whose log-probs are changed after they are computed."""
    backend = FakeBackend()
    score = backend._fake.score
    setattr(backend._fake, "score", lambda call: change(score(call), call))  # noqa: B010  # mypy: a method
    return backend


def signalling(change: Change) -> FakeBackend:
    """A table whose cotangents are changed, and its gradient with them."""
    backend = FakeBackend()
    engine = backend._fake
    accumulate = engine.accumulate

    def changed(call: PreparedCall) -> Gradient:
        before = engine.gradient
        gradient = accumulate(call)
        own = {i: change(c, call, i) for i, c in (gradient.cotangents or {}).items()}
        added = torch.stack([engine.model.backward(r, own[i]) for i, r in enumerate(call.requests)]).sum(0)
        engine.gradient = added if before is None else before + added
        return replace(gradient, cotangents=own)

    setattr(engine, "accumulate", changed)  # noqa: B010  # mypy: a method
    return backend


def reporting(factor: float) -> FakeBackend:
    """A table that reports its loss times a factor."""
    backend = FakeBackend()
    accumulate = backend._fake.accumulate

    def changed(call: PreparedCall) -> Gradient:
        gradient = accumulate(call)
        output: Any = gradient.output
        metrics = {name: value * (factor if name == "loss:sum" else 1.0) for name, value in output.metrics.items()}
        return replace(gradient, output=replace(output, metrics=metrics))

    setattr(backend._fake, "accumulate", changed)  # noqa: B010  # mypy: a method
    return backend


def stepping(backend: Any, **changed: Any) -> Any:
    """A backend whose optimizer steps with other hyperparameters than it is given; functions are of the given one."""
    engine = backend._engine
    step = engine.step

    def altered(params: Any, divisor: Any) -> Any:
        fields = {k: v(getattr(params, k)) if callable(v) else v for k, v in changed.items()}
        return step(replace(params, **fields), divisor)

    engine.step = altered
    return backend


def scaled(names: Callable[[str], bool], factor: float) -> TorchBackend:
    """The exact model, with the gradients of some parameters multiplied."""
    model = TinyLM()
    for name, parameter in model.named_parameters():
        if names(name):
            parameter.register_hook(lambda g: factor * g)
    return TorchBackend(model)


def detached(block: int) -> TorchBackend:
    """The exact model, with nothing going back below one block."""
    model = TinyLM()
    model.blocks[block].register_forward_pre_hook(lambda _, given: (given[0].detach(), *given[1:]))
    return TorchBackend(model)


def unreadable(backend: FakeBackend) -> FakeBackend:
    """A table whose gradients cannot be read."""
    setattr(backend._fake, "gradients", lambda: super(type(backend._fake), backend._fake).gradients())  # noqa: B010
    return backend
