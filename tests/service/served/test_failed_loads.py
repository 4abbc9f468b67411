"""A load that fails: weights, optimizer and accumulated gradients of the model are as if nobody had asked for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import MODEL, Direct

from pullback.backends import TorchBackend
from pullback.backends.native.checkpoints import checkpoint
from pullback.backends.preserve import has_accumulated
from pullback.errors import StorageError
from pullback.service.durability.answers import Failure
from pullback.service.durability.journal import Journal

URI = f"tinker://{MODEL}/weights/one"
SLOW = pytest.mark.slow
Damage = Callable[[Path, pytest.MonkeyPatch], Any]


def half_way(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The weights and the optimizer are in place when the error comes."""

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    patch.setattr(checkpoint, "restore_random", fail)


def full_disk(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The checkpoint is in place, and the journal cannot note it."""

    def fail(*_: Any) -> None:
        raise StorageError("the server's disk is full")

    patch.setattr(Journal, "set_lora", fail)


DAMAGES: dict[str, Damage] = {
    "no optimizer": lambda folder, patch: (folder / "optimizer.safetensors").unlink(),
    "damaged weights": lambda folder, patch: (folder / "adapter_model.safetensors").write_bytes(b"no weights"),
    "no checkpoint": lambda folder, patch: folder.rename(folder.with_name("other")),
    "another base": lambda folder, patch: patch.setattr(checkpoint, "frozen_fingerprint", lambda module: "other"),
    "half-way": half_way,
    "full disk": full_disk,
}


def prepared(direct: Direct) -> TorchBackend:
    """A model that has moved on from its checkpoint by a step, with a gradient that no step has used."""
    direct.read(direct.gradient(1))
    direct.read(direct.call("optim_step", 2))
    direct.read(direct.call("save_weights", 3, path="one"))
    direct.read(direct.gradient(4, "grpo"))
    direct.read(direct.call("optim_step", 5))
    direct.read(direct.gradient(6))
    return direct.models.backends[MODEL]


def state(backend: TorchBackend) -> dict[str, torch.Tensor]:
    """Copies of the trained weights, their moments and gradients."""
    engine = backend._native
    kinds = {
        "weight": {name: p.detach() for name, p in engine.parameters.items()},
        "optimizer": engine.optimizer.to_tensors(),
        "gradient": engine.accumulator.gradients,
    }
    return {f"{kind} {name}": tensor.clone() for kind, held in kinds.items() for name, tensor in held.items()}


@pytest.mark.parametrize("damage", [name if name == "half-way" else pytest.param(name, marks=SLOW) for name in DAMAGES])
def test_nothing_has_changed(direct: Direct, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; the step that follows is made of the gradient that had accumulated."""
    backend = prepared(direct)
    before, version = state(backend), backend.weights_version
    assert any(key.startswith("gradient") for key in before)
    with monkeypatch.context() as patch:
        DAMAGES[damage](direct.models.checkpoints.folder(MODEL, "weights") / "one", patch)
        answer = direct.read(direct.call("load_weights", 7, path=URI, optimizer=True))
    assert isinstance(answer, Failure), answer
    assert direct.models.backends[MODEL] is backend
    after = state(backend)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert backend.weights_version == version
    metrics = direct.read(direct.call("optim_step", 8))["metrics"]
    assert metrics["grad_norm"] > 0
    assert metrics["tokens"] == 12


def test_weights_of_half_a_step_stay_refused(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed step has left between two steps is that again after the load; one that succeeds ends it."""
    backend, folder = prepared(direct), direct.models.checkpoints.folder(MODEL, "weights") / "one"
    backend._native.optimizer.half_stepped = True
    for number, damaged in ((7, True), (9, False)):
        with monkeypatch.context() as patch:
            if damaged:
                half_way(folder, patch)
            answer = direct.read(direct.call("load_weights", number, path=URI, optimizer=True))
        assert isinstance(answer, Failure) == damaged
        assert isinstance(direct.read(direct.gradient(number + 1)), Failure) == damaged


@SLOW
@pytest.mark.parametrize("optimizer", [False, True])
def test_a_load_that_succeeds_takes_their_place(direct: Direct, optimizer: bool) -> None:
    """The negative control: weights of the checkpoint, and no gradient of those that were there before."""
    backend = prepared(direct)
    before = state(backend)
    answer = direct.read(direct.call("load_weights", 7, path=URI, optimizer=optimizer))
    assert answer["type"] == "load_weights"
    after = state(backend)
    assert not has_accumulated(backend)
    assert not any(key.startswith("gradient") for key in after)
    assert any(key.startswith("optimizer") for key in after) == optimizer
    assert not any(
        torch.equal(after[key], tensor) for key, tensor in before.items() if "lora_B" in key and "weight " in key
    )
