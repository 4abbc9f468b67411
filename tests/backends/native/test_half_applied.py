"""Nothing is left half applied: by a failed backward, an interrupted step, a load, a loss that trains, other threads."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_backend, tiny_llama, unweighted_nll, weights_of
from torch import Tensor

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native.execution import deferred_backward
from pullback.datums import Datum
from pullback.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    InvalidDatumsError,
    NonFiniteError,
    PrecedingOperationFailed,
)
from pullback.testing import TinyLM

DATA = make_data([6, 4, 5, 3])
PARAMS = AdamParams(learning_rate=1e-2)


def test_a_retained_forward_serves_no_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a backward that failed half-way its graphs are gone: a retry would have the gradient of the rest alone."""
    backend = tiny_backend(token_budget=8)
    retained = backend.forward_retain(DATA).result()
    calls, backward = [0], torch.autograd.backward

    def failing(*given: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("pretended")
        backward(*given, **options)

    monkeypatch.setattr(torch.autograd, "backward", failing)
    places = {retained: range(len(DATA))}
    assert backend.backward(places, DATA, "cross_entropy").exception() is not None
    monkeypatch.undo()
    assert retained.spent
    assert backend.gradients() == {}
    with pytest.raises(BackendError, match="served already"):
        backend.backward(places, DATA, "cross_entropy").result()


def test_a_retained_forward_belongs_to_its_weights(tmp_path: Path) -> None:
    """Not to the number of their steps, which a checkpoint may have too; nor to another temperature."""
    backend = TorchBackend(tiny_llama(torch.float64, lora=4), checkpoint_dir=tmp_path)
    start = backend.save_state("start").result().path
    backend.forward_backward(DATA, "cross_entropy").result()
    backend.optim_step(PARAMS).result()
    one = backend.save_state("one").result().path
    backend.load_state(start).result()
    backend.forward_backward(DATA, "ppo").result()
    backend.optim_step(PARAMS).result()
    retained = backend.forward_retain(DATA).result()
    backend.load_state(one).result()
    assert backend.weights_version == retained.weights_version
    with pytest.raises(BackendError, match="weights have changed"):
        backend.backward({retained: range(4)}, DATA, "cross_entropy").result()
    fresh = backend.forward_retain(DATA).result()
    tempered = [d.with_inputs(temperature=[0.5]) for d in DATA]
    with pytest.raises(BackendError, match="these are others"):
        backend.backward({fresh: range(4)}, tempered, "cross_entropy").result()


@pytest.mark.parametrize("places", [[[0], [0]], [[5]], [[-1]]])
def test_each_datum_has_one_place(places: list[list[int]]) -> None:
    """Twice would double its gradient."""
    backend = tiny_backend()
    retained = {backend.forward_retain(DATA[:1]).result(): at for at in places}
    with pytest.raises(BackendError, match="each datum has one place"):
        backend.backward(retained, DATA[:1], "cross_entropy").result()


def test_a_checkpoint_does_not_forget_a_failure(tmp_path: Path) -> None:
    """An accumulation that lacks a batch is not saved as if it were whole."""
    backend = tiny_backend(checkpoint_dir=tmp_path)
    backend.forward_backward(DATA, "cross_entropy").result()
    failed = backend.forward_backward_custom(DATA, lambda d, x: (x[0].sum() * float("nan"), {}))
    with pytest.raises(PrecedingOperationFailed):
        backend.save_state("broken").result()
    assert failed.exception() is not None
    backend.save_state("whole").result()


def test_totals_and_groups_survive_a_checkpoint(tmp_path: Path) -> None:
    """What was refused before is refused after."""
    loss, first = {"aggregation": "token_mean"}, tiny_backend(checkpoint_dir=tmp_path)
    first.forward_backward(DATA[:2], "cross_entropy", loss, counts={"tokens": 16}).result()
    path = first.save_state("one").result().path
    resumed = tiny_backend(checkpoint_dir=tmp_path)
    resumed.load_state_with_optimizer(path).result()
    with pytest.raises(ConfigError, match="an earlier call said 16"):
        resumed.forward_backward(DATA[2:], "cross_entropy", loss, counts={"tokens": 99}).result()


def test_an_interrupted_step_is_not_made_again(tmp_path: Path) -> None:
    """Where weights have moved already, nothing goes on but a load; the load goes on as if nothing had been."""
    backend = tiny_backend(checkpoint_dir=tmp_path)
    backend.forward_backward(DATA, "cross_entropy").result()
    path = backend.save_state("before").result().path
    hook = backend._native.optimizer._adamw.register_step_post_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        backend.optim_step(PARAMS)
    hook.remove()
    for again in (lambda: backend.optim_step(PARAMS), lambda: backend.forward(DATA)):
        with pytest.raises(BackendError, match="interrupted while it changed the weights"):
            again().result()
    backend.discard_gradients()
    backend.load_state_with_optimizer(path).result()
    backend.optim_step(PARAMS).result()
    plain = tiny_backend()
    plain.forward_backward(DATA, "cross_entropy").result()
    plain.optim_step(PARAMS).result()
    assert distance(weights_of(backend), weights_of(plain)) == 0.0


def test_a_norm_that_overflows_makes_no_step() -> None:
    """Clipping by an infinite norm would make every gradient zero."""
    model = TinyLM(dtype=torch.float32)
    backend = TorchBackend(model)
    data = [d.with_inputs(weights=[1e22] * len(d.model_input)) for d in DATA]
    backend.forward_backward(data, "cross_entropy").result()
    before = weights_of(backend)
    with pytest.raises(NonFiniteError, match="norm of the gradient is inf"):
        backend.optim_step(AdamParams(grad_clip_norm=1.0)).result()
    assert distance(weights_of(backend), before) == 0.0


def test_gradients_from_before_are_not_ours() -> None:
    """A model may come with ``.grad`` set."""
    model = TinyLM()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    backend, clean = TorchBackend(model), tiny_backend()
    for each in (backend, clean):
        each.forward_backward(DATA, "cross_entropy").result()
    assert distance(backend.gradients(), clean.gradients()) == 0.0


def test_a_loss_may_score_but_not_train() -> None:
    """An operation inside another one would be rolled back with it, or step on half of it."""
    backend = tiny_backend()

    def training(data: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        assert backend.forward(DATA).result()
        backend.forward_backward(DATA, "cross_entropy").result()
        return unweighted_nll(data, logprobs)

    for verb in ("optim_step", "forward_backward"):
        with pytest.raises(BackendError, match="a loss may score, but not train"):
            backend.forward_backward_custom(DATA, training).result()
        assert backend.gradients() == {}, verb

    def discarding(data: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        backend.discard_gradients()
        return unweighted_nll(data, logprobs)

    with pytest.raises(BackendError, match="discard_gradients inside another"):
        backend.forward_backward_custom(DATA, discarding).result()


def test_discarding_and_closing_wait_for_what_runs() -> None:
    """Another thread that discards or closes meanwhile does it before or after, never in between."""
    backend, inside = tiny_backend(), threading.Event()
    backend.forward_backward(DATA, "cross_entropy").result()

    def discard() -> None:
        assert inside.wait(60)
        backend.discard_gradients()

    thread = threading.Thread(target=discard)
    thread.start()

    def slow(data: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        inside.set()
        thread.join(0.2)
        assert thread.is_alive()
        return unweighted_nll(data, logprobs)

    backend.forward_backward_custom(DATA, slow).result()
    thread.join()
    assert backend.gradients() == {}
    assert not backend.optim_step(PARAMS).result().stepped


def test_a_failure_keeps_no_graph() -> None:
    """The error of a loss that failed holds no frames, and so no graphs, for as long as somebody keeps it."""
    backend, seen = tiny_backend(), list[weakref.ref[Any]]()
    add = deferred_backward.DeferredBackward.add

    def noting(self: Any, batch: Any) -> None:
        seen.append(weakref.ref(self))
        add(self, batch)

    def failing(data: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        raise KeyError("mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred_backward.DeferredBackward, "add", noting)
        error = backend.forward_backward_custom(DATA, failing).exception()
    gc.collect()
    assert isinstance(error, KeyError)
    assert seen
    assert seen[0]() is None


def test_damaged_manifests_change_nothing(tmp_path: Path) -> None:
    """Whatever is wrong with one is a CheckpointError, before any weight has been read."""
    backend = tiny_backend(checkpoint_dir=tmp_path)
    backend.forward_backward(DATA, "cross_entropy").result()
    path = Path(backend.save_state("one").result().path)
    backend.optim_step(PARAMS).result()
    before, manifest = weights_of(backend), json.loads((path / "manifest.json").read_text())
    contents: list[Any] = [[], None, {"format": 1}, {k: v for k, v in manifest.items() if k != "window"}]
    damaged = [json.dumps(x) for x in contents]
    for text in [*(d.encode() for d in damaged), b"\xff\xfe\x00"]:
        (path / "manifest.json").write_bytes(text)
        with pytest.raises(CheckpointError):
            backend.load_state_with_optimizer(path).result()
    with pytest.raises(CheckpointError):
        backend.load_state(path / "manifest.json").result()
    with pytest.raises(CheckpointError, match="checkpoint name 5"):
        backend.save_state(5).result()  # type: ignore[arg-type]  # the point
    assert distance(weights_of(backend), before) == 0.0
    assert backend.weights_version == 1


def test_one_kind_of_targets_a_call() -> None:
    """Single targets and candidates do not mix, whatever the layout and the budget."""
    wide = Datum(DATA[0].model_input, {"target_tokens": torch.ones(6, 2, dtype=torch.int64)})
    plain = Datum(DATA[1].model_input, {"target_tokens": DATA[1].loss_fn_inputs["target_tokens"]})
    for options in ({}, {"layout": "single", "token_budget": 6}):
        with pytest.raises(InvalidDatumsError, match="datum 1: has one target"):
            tiny_backend(**options).forward_backward([wide, plain], "cross_entropy").result()


def test_nonsense_fails_its_future() -> None:
    """What is no data at all is refused like all else."""
    backend = tiny_backend()
    for future in (backend.forward_retain(None), backend.backward({}, None, "ppo")):  # type: ignore[arg-type]  # the point
        assert isinstance(future.exception(), InvalidDatumsError)
