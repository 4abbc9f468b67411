"""The protocol between losses and trainers: four verbs, and the state around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias

from torch import Tensor

from ..datums.types import Datum, ModelInput
from ..losses.base import Loss
from .operations.futures import Future
from .types import (
    AdamParams,
    ForwardBackwardOutput,
    OptimStepOutput,
    Plan,
    Rollout,
    SamplingParams,
    SaveStateOutput,
)

__all__ = ["CustomLoss", "NormalizationMode", "PolicyBackend", "ReferenceModel", "SamplingBackend", "TrainerBackend"]

NormalizationMode: TypeAlias = Literal["num_loss_tokens", "num_sequences", "auto"] | float | None
CustomLoss: TypeAlias = Callable[[Sequence[Any], list[Tensor]], tuple[Tensor, Mapping[str, float]]]


class ReferenceModel(Protocol):
    """A frozen model that can only score."""

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Score the target tokens of ``data``."""
        ...


class TrainerBackend(Protocol):
    """Anything that can pull a cotangent back through a model. Operations take effect in submission order."""

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> Future[ForwardBackwardOutput]:
        """Score all target tokens, and evaluate a registered loss; no gradient."""
        ...

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str | Loss, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Accumulate the gradient of a registered loss."""
        ...

    def forward_backward_custom(self, data: Sequence[Datum], loss_fn: CustomLoss) -> Future[ForwardBackwardOutput]:
        """Accumulate the gradient of any function of the log-probs."""
        ...

    def optim_step(
        self, params: AdamParams, grad_accumulation_normalization: NormalizationMode = None
    ) -> Future[OptimStepOutput]:
        """Divide the accumulated gradient once, clip it and make one AdamW step."""
        ...

    def discard_gradients(self) -> None:
        """Forget what has been accumulated, failed or not."""
        ...

    def plan(self, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum]) -> Plan:
        """Say what would be done, before any work."""
        ...

    def reference(self) -> ReferenceModel:
        """The frozen reference."""
        ...

    def save_state(self, name: str) -> Future[SaveStateOutput]:
        """Write weights, optimizer, accumulation, counters and random state."""
        ...

    def load_state(self, path: str) -> Future[None]:
        """Load weights only; the optimizer starts cold."""
        ...

    def load_state_with_optimizer(self, path: str) -> Future[None]:
        """Load everything: the next step is what it would have been."""
        ...

    def close(self) -> None:
        """Release the model; raise failures that nobody retrieved."""
        ...


class SamplingBackend(Protocol):
    """A backend that can also sample from the current weights."""

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> Future[list[Rollout]]:
        """Draw ``n`` completions of each prompt; prompt-major order."""
        ...


class PolicyBackend(TrainerBackend, SamplingBackend, Protocol):
    """A backend that trains and samples: what reinforcement learning needs. It is closed at the end of a ``with`` block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
