"""A call is taken apart once: each datum is validated, packed and evaluated once, and metrics are asked for at most once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import make_data, tiny_backend
from torch import Tensor

from pullback.backends import AdamParams, Backend, FakeBackend, Plan
from pullback.datums import Datum, validation
from pullback.losses import CrossEntropy, Loss, TokenBatch, base, get_loss
from pullback.losses.batch import adapt
from pullback.ops import logprobs

LENGTHS = [9, 7, 5, 3, 8, 6, 4, 2]
DATA = make_data(LENGTHS)
TOKENS = sum(LENGTHS)
BACKENDS: dict[str, Callable[[], Backend]] = {
    "fake": FakeBackend,
    "native, one forward": tiny_backend,
    "native, several forwards": lambda: tiny_backend(token_budget=16),
    "native, each pair in two forwards": lambda: tiny_backend(token_budget=9),
}


@dataclass
class Counted:
    """How often each datum was validated and packed, and how many tokens the loss and its metrics saw."""

    validated: Counter[int] = field(default_factory=Counter)
    packed: Counter[int] = field(default_factory=Counter)
    evaluated: int = 0
    described: int = 0

    def once(self, data: list[Datum]) -> bool:
        """Whether everything happened to all of the data, once."""
        ones = {id(datum): 1 for datum in data}
        return self.validated == self.packed == ones and self.evaluated == self.described == sum(map(_size, data))


def _size(datum: Datum) -> int:
    return len(datum.model_input)


def count(patch: pytest.MonkeyPatch, loss: type[Loss]) -> Counted:
    """Count from now on."""
    counted = Counted()
    problems, pack, terms, describe = validation._problems, adapt.batch_from_datums, loss.terms, loss.describe

    def validating(datum: Datum, *rest: Any) -> Any:
        counted.validated[id(datum)] += 1
        return problems(datum, *rest)

    def packing(data: Any, *rest: Any) -> TokenBatch:
        counted.packed.update(map(id, data))
        return pack(data, *rest)

    def evaluating(self: Loss, batch: TokenBatch) -> Any:
        counted.evaluated += batch.logprobs.shape[0]
        return terms(self, batch)

    def describing(self: Loss, batch: TokenBatch) -> Any:
        counted.described += batch.logprobs.shape[0]
        return describe(self, batch)

    patch.setattr(validation, "_problems", validating)
    patch.setattr(base, "batch_from_datums", packing)
    patch.setattr(loss, "terms", evaluating)
    patch.setattr(loss, "describe", describing)
    return counted


@pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("name", ["cross_entropy", "grpo", "dpo"])
def test_everything_happens_once(make: Callable[[], Backend], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a gradient call, in a forward, and for a loss that is given as a function."""
    backend = make()
    verbs = (backend.forward_backward, backend.forward, backend.forward_backward_custom)
    for verb in verbs:
        counted = count(monkeypatch, type(get_loss(name)))
        verb(DATA, get_loss(name)).result()
        assert counted.once(DATA), (verb.__name__, counted)
        monkeypatch.undo()
    assert backend.optim_step(AdamParams()).result().stepped


@pytest.mark.parametrize("name", ["cross_entropy", "ppo"])
def test_a_trained_head_in_chunks_evaluates_each_token_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-pass head asks for the cotangent chunk by chunk of rows, and of each token once."""
    chunks, surrogate = list[int](), logprobs.logprob_surrogate

    def chunked(hidden: Tensor, head: Any, targets: Tensor, cotangent: Any, temperature: float) -> Any:
        def counting(values: Tensor, at: slice) -> Tensor:
            chunks.append(len(values))
            return torch.as_tensor(cotangent(values, at))

        budget = 3 * 17 * 8
        return surrogate(hidden, head, targets, counting, temperature=temperature, memory_budget=budget)

    monkeypatch.setattr("pullback.backends.native.execution.deferred_backward.logprob_surrogate", chunked)
    backend = tiny_backend()
    counted = count(monkeypatch, type(get_loss(name)))
    backend.forward_backward(DATA, name).result()
    assert len(chunks) > 3
    assert counted.once(DATA), counted


def test_a_second_evaluation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    counted = count(monkeypatch, CrossEntropy)
    backend = tiny_backend()
    for _ in range(2):
        backend.forward(DATA).result()
    assert not counted.once(DATA)
    assert counted.evaluated == 2 * TOKENS


def test_a_plan_validates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan evaluates nothing; where inputs are missing it refuses in words."""
    counted = count(monkeypatch, CrossEntropy)
    plan: Plan = tiny_backend().plan("cross_entropy", DATA)
    assert plan.route == "native"
    assert set(counted.validated.values()) == {1}
    assert (counted.evaluated, counted.described, sum(counted.packed.values())) == (0, 0, 0)
    bare = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in DATA]
    assert "missing required field 'weights'" in tiny_backend().plan("dpo", bare).reason
