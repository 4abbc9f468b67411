"""`diff` against a service: what is compared there, and what is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffed import DATA, named, squares, verdicts
from helpers import tiny_llama
from servers import SDK_WARNINGS

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native.models.lora import LoraChoice
from pullback.errors import BackendError
from pullback.service import Base
from pullback.testing import diff


@pytest.fixture
def twin() -> TorchBackend:
    """The native backend on the model and the adapter that the service has."""
    base: Any = tiny_llama(torch.float32).model
    return TorchBackend(Base("tiny", base).adapted(LoraChoice(4, 3)))


class TestRemote:
    """On our own service, through the official SDK."""

    pytestmark = SDK_WARNINGS

    @pytest.mark.parametrize("loss", ["cross_entropy", "grpo", squares], ids=named)
    @pytest.mark.parametrize("deferred", [False, True], ids=["sent", "held"])
    def test_a_service_is_its_twin(self, connect: Any, twin: TorchBackend, loss: Any, deferred: bool) -> None:
        """With steps allowed every stage is compared, and agrees; the report says what was left there."""
        found = diff(twin, connect(defer_backward=deferred), loss, DATA, allow_step=True)
        assert not found.diverges, str(found)
        assert verdicts(found).count("same") >= 4, str(found)
        assert "optimizer steps were made" in found.left

    def test_nothing_is_done_unasked(self, connect: Any, twin: TorchBackend) -> None:
        """Without permission only forwards are made, and the report says what was not compared and why."""
        remote = connect()
        before = remote.forward(DATA).result().loss_fn_outputs
        found = diff(twin, remote, "grpo", DATA)
        assert verdicts(found) == ["same", "same", "not compared", "not compared", "not compared"], str(found)
        assert "--allow-step" in str(found)
        assert found.left == ""
        assert remote.forward(DATA).result().loss_fn_outputs == before
        assert not remote.optim_step(AdamParams()).result().stepped

    def test_gradients_that_are_held_here(self, connect: Any, twin: TorchBackend) -> None:
        """Cotangents that have not been sent are compared without permission, and forgotten."""
        remote = connect(defer_backward=True)
        found = diff(twin, remote, "grpo", DATA)
        assert verdicts(found)[:3] == ["same"] * 3, str(found)
        assert not remote.optim_step(AdamParams()).result().stepped

    def test_an_adapter_of_another_seed(self, connect: Any) -> None:
        """Log-probs agree, as adapters begin at nothing, and the first step does not: the report says so."""
        base: Any = tiny_llama(torch.float32).model
        other = TorchBackend(Base("tiny", base).adapted(LoraChoice(4, 5)))
        found = diff(other, connect(), "cross_entropy", DATA, allow_step=True)
        assert found.first is not None
        assert found.first.stage == "gradient"
        assert "adapters that begin with other numbers" in found.cause

    def test_a_gradient_is_not_left_for_others(self, connect: Any) -> None:
        """Where the comparison ends after a gradient was sent, that gradient goes into no step of yours."""
        remote = connect()
        found = diff(reporting_llama(), remote, "cross_entropy", DATA, allow_step=True)
        assert found.first is not None
        assert found.first.stage == "loss"
        assert "learning rate 0" in found.left
        assert not remote.optim_step(AdamParams()).result().stepped

    def test_gradients_before_it_are_refused(self, connect: Any, twin: TorchBackend) -> None:
        """Steps are not compared on top of gradients that are somebody's."""
        remote = connect()
        remote.forward_backward(DATA, "cross_entropy").result()
        with pytest.raises(BackendError, match="no step has used"):
            diff(twin, remote, "cross_entropy", DATA, allow_step=True)


def reporting_llama() -> TorchBackend:
    """The service's twin, with twice the loss in its report."""
    base: Any = tiny_llama(torch.float32).model
    backend = TorchBackend(Base("tiny", base).adapted(LoraChoice(4, 3)))
    engine: Any = backend._engine
    accumulate = engine.accumulate

    def changed(call: Any) -> Any:
        gradient = accumulate(call)
        gradient.output.metrics["loss:sum"] *= 2
        return gradient

    engine.accumulate = changed
    return backend
