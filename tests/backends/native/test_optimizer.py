"""The step: nothing of it is left behind when it fails, and no cast of old weights after it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_backend, weights_of

from pullback.backends import AdamParams
from pullback.backends.native import optimizer


def test_a_step_that_fails_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that runs out of memory leaves the gradients undivided and unclipped: the second try is the first."""
    params = AdamParams(learning_rate=1e-3, grad_clip_norm=0.5)
    clean, failing = tiny_backend(), tiny_backend()
    for backend in (clean, failing):
        backend.forward_backward(make_data((5, 3, 7, 4)), "cross_entropy", {"aggregation": "token_mean"}).result()
    before = failing.gradients()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for the moments")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", full)
        with pytest.raises(torch.OutOfMemoryError):
            failing.optim_step(params).result()
    assert distance(failing.gradients(), before) == 0.0
    first, second = clean.optim_step(params).result(), failing.optim_step(params).result()
    assert first.metrics["grad_norm"] == second.metrics["grad_norm"]
    assert distance(weights_of(failing), weights_of(clean)) == 0.0


def test_a_step_under_autocast_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training inside one autocast region goes as with a region around each call: no cast of old weights is used."""
    pytest.importorskip("transformers", reason="linear layers under autocast: a random Llama (extra hf)")
    from pullback.backends import TorchBackend
    from pullback.backends.native import HFModel
    from pullback.testing.models import zoo

    def losses(around: bool) -> list[float]:
        found, backend = [], TorchBackend(HFModel(zoo.build("llama")))
        with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    result = backend.forward_backward(make_data((5, 3)), "cross_entropy").result()
                found.append(result.metrics["loss:sum"])
                backend.optim_step(AdamParams(learning_rate=1e-2)).result()
        return found

    assert losses(True) == losses(False)
    with monkeypatch.context() as patch:  # negative control
        patch.setattr(optimizer, "forget_casts", lambda: None)
        assert losses(True) != losses(False)
