"""An operation that fails in whatever operator of PyTorch leaves the state as it was, or is known to have half changed it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import distance, make_data, weights_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.backends import AdamParams, Future, TorchBackend
from pullback.backends.native.accumulator import Accumulator
from pullback.backends.native.optimizer import Optimizer
from pullback.errors import BackendError
from pullback.testing import TinyLM

DATA = make_data([6, 4, 5, 3])
PLACES = st.floats(0.0, 1.0)
STEPS = st.sampled_from([AdamParams(1e-2), AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=0.5)])
HALF_CHANGED = "interrupted while it changed the weights"


class FailingAt(TorchDispatchMode):
    """Counts operators, and raises in place of one of them."""

    def __init__(self, number: int = -1, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count, self._number, self._error = 0, number, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self._number:
            raise self._error("pretended")
        return func(*args, **(kwargs or {}))


def state_of(backend: TorchBackend) -> dict[str, Tensor]:
    """Copies of all that the next step depends on."""
    gradients = {f"gradient:{name}": gradient for name, gradient in backend.gradients().items()}
    moments = {name: moment.clone() for name, moment in backend._native.optimizer.to_tensors().items()}
    return weights_of(backend) | moments | gradients


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def begun(dtype: torch.dtype = torch.float32, **options: Any) -> TorchBackend:
    """A backend that has made a step, and in which gradients have accumulated since."""
    backend = TorchBackend(TinyLM(dtype=dtype), **options)
    trained(backend)
    backend.forward_backward(DATA, "cross_entropy").result()
    return backend


def trained(backend: TorchBackend) -> None:
    backend.forward_backward(DATA, "cross_entropy").result()
    backend.optim_step(AdamParams(1e-2)).result()


def failed(place: float, operation: Callable[[], Future[Any]], total: int, error: type[Exception]) -> bool:
    """Run an operation that fails at a place between its first operator (0) and its last (1); return whether it did."""
    with FailingAt(1 + round(place * (total - 1)), error):
        future = operation()
    return future.exception() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
@settings(max_examples=8)
@given(place=PLACES, params=STEPS)
def test_steps(dtype: torch.dtype, place: float, params: AdamParams) -> None:
    """A step that failed is made again as if it had never been tried, or not at all."""
    plain, backend = begun(dtype), begun(dtype)
    with FailingAt() as operators:
        plain.optim_step(params).result()
    assert failed(place, lambda: backend.optim_step(params), operators.count, torch.OutOfMemoryError)
    again = backend.optim_step(params).exception()
    assert same(state_of(backend), state_of(plain)) if again is None else HALF_CHANGED in str(again)


@pytest.mark.parametrize(
    ("name", "changed"), [("_foreach_add_", False), ("_foreach_lerp_", True), ("_foreach_sqrt", True)]
)
def test_fused_steps(name: str, changed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that have moved count, though no weight has: a GPU's memory runs out at the root of the second ones."""
    backend = begun()
    backend._native.optimizer._adamw.param_groups[0]["foreach"] = True

    def failing(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("pretended")

    before = state_of(backend)
    monkeypatch.setattr(torch, name, failing)
    assert isinstance(backend.optim_step(AdamParams()).exception(), torch.OutOfMemoryError)
    monkeypatch.undo()
    assert same(state_of(backend), before) != changed
    again = backend.optim_step(AdamParams()).exception()
    assert HALF_CHANGED in str(again) if changed else again is None


@pytest.mark.slow
@settings(max_examples=8)
@given(place=PLACES, error=st.sampled_from([torch.OutOfMemoryError, KeyError]))
def test_gradients(place: float, error: type[Exception]) -> None:
    """What had accumulated is what it was, or has all of the call: nothing is added twice or in part."""
    plain, backend = begun(), begun()
    before, weights = state_of(backend), weights_of(backend)
    with FailingAt() as operators:
        plain.forward_backward(DATA, "ppo").result()
    if failed(place, lambda: backend.forward_backward(DATA, "ppo"), operators.count, error):
        assert same(state_of(backend), before)
        backend.forward_backward(DATA, "ppo").result()
    assert distance(backend.gradients(), plain.gradients()) < 1e-6
    assert same(weights_of(backend), weights)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_sums(number: int) -> None:
    """Gradients that were being added when it failed are what they were."""
    parameters = {name: torch.nn.Parameter(torch.zeros(3)) for name in "abc"}
    accumulator, fresh = Accumulator(parameters), [torch.full((3,), 2.0) for _ in parameters]
    accumulator.restore({name: torch.ones(3) for name in parameters})

    def add() -> None:
        with FailingAt(number, KeyError), accumulator.adding():
            for p, gradient in zip(parameters.values(), fresh, strict=True):
                p.grad = gradient

    with pytest.raises(KeyError):
        add()
    assert [gradient.tolist() for gradient in accumulator.gradients.values()] == [[1.0] * 3] * 3


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.slow
@settings(max_examples=8)
@given(place=PLACES)
@example(place=1.0)
def test_loads(everything: bool, place: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A load that failed has changed nothing, or nothing goes on but the next one, after which all is as saved."""
    backend = begun(torch.bfloat16, checkpoint_dir=tmp_path_factory.mktemp("loads"))
    path = Path(backend.save_state("one").result().path)

    def load() -> Future[None]:
        return (backend.load_state_with_optimizer if everything else backend.load_state)(path)

    backend.discard_gradients()
    with FailingAt() as operators:
        load().result()
    wanted = state_of(backend)
    backend.discard_gradients()
    trained(backend)
    before = state_of(backend)
    assert failed(place, load, operators.count, torch.OutOfMemoryError)
    if not same(state_of(backend), before):
        with pytest.raises(BackendError, match=HALF_CHANGED):
            backend.forward(DATA).result()
    load().result()
    assert same(state_of(backend), wanted)


def test_a_step_that_only_looks_at_weights_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: moments that have moved would move again."""
    plain, backend = begun(), begun()
    plain.optim_step(AdamParams()).result()
    backend._native.optimizer._adamw.param_groups[0]["foreach"] = True
    monkeypatch.setattr(Optimizer, "_versions", lambda self, stepped: sum(p._version for p in stepped))
    monkeypatch.setattr(torch, "_foreach_sqrt", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("pretended")))
    assert backend.optim_step(AdamParams()).exception() is not None
    monkeypatch.setattr(torch, "_foreach_sqrt", lambda tensors: tuple(t.sqrt() for t in tensors))
    assert backend.optim_step(AdamParams()).exception() is None
    assert distance(state_of(backend), state_of(plain)) > 1e-3
