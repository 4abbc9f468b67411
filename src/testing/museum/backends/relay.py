"""A backend that hands every verb on to one that is right: a defect is what it does otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final, TypeVar

import torch
from torch import Tensor

from ....backends.base import Backend
from ....backends.fake.engine import FakeEngine
from ....backends.fake.table import TableModel
from ....backends.operations.futures import Future
from ....backends.protocol import CustomLoss, NormalizationMode, ReferenceModel, TrainerBackend
from ....backends.types import (
    AdamParams,
    ForwardBackwardOutput,
    OptimStepOutput,
    Plan,
    Rollout,
    SamplingParams,
    SaveStateOutput,
)
from ....datums.types import Datum, ModelInput
from ....losses.base import Loss
from ...conformance import PROMISES
from ...under_test import BackendUnderTest, closing
from ..exhibit import Exhibit

__all__ = ["EditedCalls", "Relay", "planted"]

Config = Mapping[str, Any] | None
R = TypeVar("R", bound="Relay")
_VOCAB_SIZE: Final = 17


def planted(found_by: str, source: str, harm: str) -> Callable[[type[R]], type[R]]:
    """Return a decorator that makes an exhibit of a backend; the arguments are those of `Exhibit`."""

    def decorate(broken: type[R]) -> type[R]:
        name = re.sub(r"(?<!^)(?=[A-Z])", " ", broken.__name__).lower()
        cause = PROMISES[found_by].cause
        broken.exhibit = Exhibit(name, source, harm, broken, Relay, found_by, cause, kind="backend")
        return broken

    return decorate


class Relay:
    """Every verb as it should be.

    Attributes:
        engine: a table of logits, whose state a defect may change.
        right: a backend on it.
        exhibit: of a defect, what is said of it.
    """

    exhibit: ClassVar[Exhibit]

    def __init__(self, seed: int = 0) -> None:
        self.engine = FakeEngine(_VOCAB_SIZE, seed, (), {})
        self.right = Backend(self.engine)

    @classmethod
    def under_test(cls) -> BackendUnderTest:
        """Return what `check_backend` examines: by any seed, behind a bad network, beside a reference."""
        return BackendUnderTest(
            cls,
            name=cls.__name__,
            seeded=cls.seeded,
            unreliable=cls.unreliable,
            reference=Relay,
            reference_trains=True,
        )

    @classmethod
    def seeded(cls, seed: int) -> Relay:
        """Return a fresh backend that begins as the seed says."""
        return cls(seed)

    @classmethod
    @contextmanager
    def unreliable(cls) -> Iterator[TrainerBackend]:
        """Yield a fresh backend each of whose requests arrives twice, of which a server runs one."""
        with closing(cls()) as backend:
            yield backend

    @property
    def model(self) -> TableModel:
        """The table and its moments."""
        return self.engine.model

    @property
    def gradient(self) -> Tensor:
        """What has accumulated, or zeros."""
        return torch.zeros_like(self.model.logits) if self.engine.gradient is None else self.engine.gradient

    def forward(
        self, data: Sequence[Datum], loss_fn: str | Loss = "cross_entropy", loss_fn_config: Config = None
    ) -> Future[ForwardBackwardOutput]:
        return self.right.forward(data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str | Loss, loss_fn_config: Config = None
    ) -> Future[ForwardBackwardOutput]:
        return self.right.forward_backward(data, loss_fn, loss_fn_config)

    def forward_backward_custom(self, data: Sequence[Datum], loss_fn: CustomLoss) -> Future[ForwardBackwardOutput]:
        return self.right.forward_backward_custom(data, loss_fn)

    def optim_step(
        self, params: AdamParams, grad_accumulation_normalization: NormalizationMode = None
    ) -> Future[OptimStepOutput]:
        return self.right.optim_step(params, grad_accumulation_normalization)

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> Future[list[Rollout]]:
        return self.right.sample(prompts, n, params)

    def save_state(self, name: str) -> Future[SaveStateOutput]:
        return self.right.save_state(name)

    def load_state(self, path: str) -> Future[None]:
        return self.right.load_state(path)

    def load_state_with_optimizer(self, path: str) -> Future[None]:
        return self.right.load_state_with_optimizer(path)

    def discard_gradients(self) -> None:
        self.right.discard_gradients()

    def plan(self, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum]) -> Plan:
        return self.right.plan(loss_fn, data)

    def reference(self) -> ReferenceModel:
        return self.right.reference()

    def close(self) -> None:
        self.right.close()


class EditedCalls(Relay):
    """A backend that changes the requests for a gradient before it computes them."""

    losses: ClassVar[tuple[str, ...]] = ("cross_entropy", "importance_sampling", "ppo")

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str | Loss, loss_fn_config: Config = None
    ) -> Future[ForwardBackwardOutput]:
        if loss_fn not in self.losses or any("weights" not in getattr(d, "loss_fn_inputs", ()) for d in data):
            return self.right.forward_backward(data, loss_fn, loss_fn_config)
        loss, config = self.edited_loss(str(loss_fn), loss_fn_config)
        return self.right.forward_backward(self.edited_data(list(data)), loss, config)

    def edited_loss(self, loss: str, config: Config) -> tuple[str, Config]:
        return loss, config

    def edited_data(self, data: list[Datum]) -> list[Datum]:
        return [d.with_inputs(weights=self.edited_weights(d.loss_fn_inputs["weights"].to_torch())) for d in data]

    def edited_weights(self, weights: Tensor) -> Tensor:
        return weights
