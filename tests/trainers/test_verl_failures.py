"""What VerlEngineBackend refuses, what is left when verl fails, and what its checkpoints restore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pullback.backends import AdamParams
from pullback.backends.verl import VerlEngineBackend
from pullback.datums import Datum, ModelInput
from pullback.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    InvalidDatumsError,
    NonFiniteError,
    UnsupportedError,
)

pytest.importorskip("verl", reason="needs verl: make trainers TRAINERS=verl")
pytestmark = pytest.mark.filterwarnings("ignore")  # of verl, and of what it imports
from other_trainers import verl_tiny as tiny  # noqa: E402
from other_trainers.verl_tiny import make  # noqa: E402

STEP = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny.lone_process(tmp_path_factory.mktemp("verl")) as path:
        yield path


def test_other_targets_are_refused(folder: Path) -> None:
    """In words that name the datum and token, in the plan too; nothing has accumulated."""
    backend = make(folder)
    data = [Datum(ModelInput.from_ints([1, 2, 3, 4]), {"target_tokens": [2, 3, t, 5]}) for t in (4, 9)]
    with pytest.raises(UnsupportedError, match="datum 1: target token 2 is 9") as caught:
        backend.forward_backward_custom(data, tiny.odd_gap).result()
    assert str(caught.value) == backend.plan(tiny.odd_gap, data).reason
    many = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": torch.ones(2, 3, dtype=torch.int64)})
    with pytest.raises(UnsupportedError, match="datum 0: has 3 targets"):
        backend.forward_backward_custom([many], tiny.odd_gap).result()
    assert backend.gradients() == {}
    plan = backend.plan(tiny.odd_gap, data[:1])  # the control
    assert (plan.route, plan.recomputed) == ("two_passes", 5)
    assert "second forward" in plan.reason


def test_engines_are_refused(folder: Path) -> None:
    """An auxiliary loss that would be dropped, another optimizer, FSDP1, a scaled loss, no size of a micro-batch."""
    with pytest.raises(UnsupportedError, match="auxiliary loss"):
        make(folder, hf={"output_router_logits": True})
    engine = tiny.tiny_engine(folder, "full")
    for name, value, words in [
        ("optimizer", torch.optim.SGD(engine.module.parameters(), lr=0.1), "SGD"),
        ("module", torch.nn.Linear(1, 1), "FSDP2"),
        ("scaler", object(), "float16"),
    ]:
        kept = getattr(engine, name)
        setattr(engine, name, value)
        with pytest.raises(UnsupportedError, match=words):
            VerlEngineBackend(engine)
        setattr(engine, name, kept)
    with pytest.raises(ConfigError, match="micro_batch_size_per_gpu"):
        make(folder, micro_batch_size_per_gpu=None)
    VerlEngineBackend(engine)  # the control


def test_long_texts_are_refused(folder: Path) -> None:
    """A sequence and its last target must fit into a micro-batch, and into the context."""
    small = make(folder, use_dynamic_bsz=True, max_token_len_per_gpu=9)
    small.forward(tiny.next_token_datums((8,))).result()
    with pytest.raises(InvalidDatumsError, match="9"):
        small.forward(tiny.next_token_datums((9,))).result()
    with pytest.raises(InvalidDatumsError, match="65"):
        make(folder).forward(tiny.next_token_datums((65,))).result()


def test_not_finite(folder: Path) -> None:
    """What verl would skip with a printed line raises; the weights and the gradients are what they were."""
    backend, data = make(folder), tiny.next_token_datums()
    backend.forward_backward(data, "cross_entropy").result()
    before, kept = tiny.weights(backend), backend.gradients()
    name, p = next(iter(backend._engine.accumulator.parameters.items()))  # type: ignore[attr-defined]
    for value, words in [(float("nan"), f"gradient of {name} is not finite"), (1e30, "norm of the gradient is inf")]:
        whole = p.grad.to_local().clone()
        p.grad.to_local()[0, 0] = value
        with pytest.raises(NonFiniteError, match=words):
            backend.optim_step(STEP).result()
        p.grad.to_local().copy_(whole)
    assert all(torch.equal(x, before[n]) for n, x in tiny.weights(backend).items())
    assert all(torch.equal(x, kept[n]) for n, x in backend.gradients().items())
    assert backend.optim_step(STEP).result().stepped


class _FailingBackward(torch.autograd.Function):
    """The identity, which fails on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failed_pass_leaves_gradients(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """verl clears the gradients when a pass fails; those of earlier calls are there all the same, and it goes on."""
    backend, data = make(folder), tiny.next_token_datums()
    backend.forward_backward(data, "cross_entropy").result()
    kept = backend.gradients()
    mlp = backend._engine.verl.module.model.layers[0].mlp  # type: ignore[attr-defined]
    original = mlp.forward

    def fail(x: Any) -> Any:
        if where == "forward" and torch.is_grad_enabled():
            raise RuntimeError("no memory")
        return _FailingBackward.apply(original(x))  # type: ignore[no-untyped-call]

    monkeypatch.setattr(mlp, "forward", fail)
    backend.forward(data).result()  # the pass that scores still runs
    with pytest.raises(RuntimeError, match="no memory"):
        backend.forward_backward(data, "cross_entropy").result()
    monkeypatch.undo()
    assert all(torch.equal(x, kept[n]) for n, x in backend.gradients().items())
    assert set(backend.gradients()) == set(kept)
    backend.forward_backward(data, "cross_entropy").result()
    assert all(torch.allclose(x, 2 * kept[n], rtol=1e-5, atol=1e-5) for n, x in backend.gradients().items())


def test_a_step_that_failed_half_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs any more but loading."""
    backend, data = make(folder), tiny.next_token_datums()
    path = backend.save_state("whole", overwrite=True).result().path
    backend.forward_backward(data, "cross_entropy").result()
    monkeypatch.setattr(backend._engine.verl, "optimizer_step", lambda: 1 / 0)  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        backend.optim_step(STEP).result()
    monkeypatch.undo()
    with pytest.raises(BackendError, match="half-way"):
        backend.forward(data).result()
    backend.discard_gradients()
    backend.load_state_with_optimizer(path).result()
    backend.forward(data).result()


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_resumes(folder: Path, trained: tiny.Trained) -> None:
    """By verl's own checkpoints: the next step is the uninterrupted one, and a cold optimizer makes another."""
    backend, data = make(folder, trained), tiny.next_token_datums()

    def train() -> dict[str, torch.Tensor]:
        backend.forward_backward(data, "cross_entropy").result()
        backend.optim_step(STEP).result()
        return tiny.weights(backend)

    first = backend.save_state("first", overwrite=True).result().path
    cold = train()
    path, before = backend.save_state("resume", overwrite=True).result().path, tiny.weights(backend)
    exact = train()
    backend.load_state_with_optimizer(path).result()
    assert backend.weights_version == 1
    assert all(torch.equal(x, before[n]) for n, x in tiny.weights(backend).items())
    assert all(torch.equal(x, exact[n]) for n, x in train().items())
    backend.load_state(path).result()
    assert all(torch.equal(x, before[n]) for n, x in tiny.weights(backend).items())
    assert not all(torch.allclose(x, exact[n], atol=1e-4) for n, x in train().items())
    backend.load_state(first).result()
    assert all(torch.equal(x, cold[n]) for n, x in train().items())  # as with an optimizer that has seen nothing


def test_checkpoints_that_are_refused(folder: Path) -> None:
    """One that exists, a name that is a path, accumulated gradients, a folder of something else, another number of ranks."""
    backend, data = make(folder), tiny.next_token_datums()
    path = Path(backend.save_state("one", overwrite=True).result().path)
    for name in ("one", "../one", ".one"):
        with pytest.raises(CheckpointError):
            backend.save_state(name).result()
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="no checkpoint of this backend"):
        backend.load_state(folder / "empty").result()
    manifest = path / "pullback.json"
    manifest.write_text(manifest.read_text().replace('"ranks": 1', '"ranks": 3'))
    with pytest.raises(CheckpointError, match="3 processes"):
        backend.load_state(path).result()
    backend.forward_backward(data, "cross_entropy").result()
    with pytest.raises(UnsupportedError, match="no accumulated gradients"):
        backend.save_state("two").result()
