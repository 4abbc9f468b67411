"""One of the two backends: what it may be asked without leaving a trace, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ...backends.base import Backend
from ...backends.preserve import has_accumulated, last_cotangents, preserved
from ...backends.protocol import CustomLoss, TrainerBackend
from ...backends.types import AdamParams, ForwardBackwardOutput
from ...datums.types import Datum
from ...errors import BackendError, UnsupportedError
from ...losses.base import Loss
from .layers import forward_order

__all__ = ["Side", "Signal", "dtype_of"]


@final
@dataclass(frozen=True, eq=False)
class Signal:
    """What one gradient call has shown.

    Attributes:
        metrics: that the backend reported.
        cotangents: dL/dlogprob of each datum; None where they cannot be seen.
    """

    metrics: Mapping[str, float]
    cotangents: list[Tensor] | None


@final
@dataclass(eq=False)
class Side:
    """A backend that is compared.

    Args:
        name: for the report.
        backend: itself.
        data: the datums.
        loss: name, loss or function.
        config: of a name.
        allow_step: what cannot be undone may be done.

    Attributes:
        undoes_gradients, undoes_steps: such calls leave no trace.
        left: what was done to it that stays.
    """

    name: str
    backend: TrainerBackend
    data: Sequence[Datum]
    loss: str | Loss | CustomLoss
    config: Mapping[str, Any] | None
    allow_step: bool
    undoes_gradients: bool = False
    undoes_steps: bool = False
    left: str = ""
    _order: Mapping[str, None] = field(default_factory=dict)

    def enter(self, stack: ExitStack) -> None:
        """Preserve the backend, as far as that is possible, until the stack is unwound.

        Raises:
            BackendError: gradients have accumulated that would go into a step.
        """
        if isinstance(self.backend, Backend):
            for weights in (True, False):
                with suppress(UnsupportedError):
                    stack.enter_context(preserved(self.backend, weights=weights))
                    self.undoes_gradients, self.undoes_steps = True, weights
                    break
            if self.allow_step and not self.undoes_steps and has_accumulated(self.backend):
                raise BackendError(
                    f"{self.name} has gradients that no step has used, and they would go into the comparison: call optim_step "
                    "or discard_gradients() before"
                )
        stack.callback(self._use_up)

    @property
    def may_accumulate(self) -> bool:
        """Whether gradient calls are allowed."""
        return self.undoes_gradients or self.allow_step

    @property
    def may_step(self) -> bool:
        """Whether steps are allowed."""
        return self.undoes_steps or self.allow_step

    def logprobs(self, data: Sequence[Datum] | None = None) -> list[Tensor]:
        """Return those of every target token, fp64."""
        outputs = self.backend.forward(self.data if data is None else data).result().loss_fn_outputs
        return [output["logprobs"].to_torch().double() for output in outputs]

    def signal(self) -> Signal:
        """Evaluate the loss, and go backward where that is allowed."""
        if self.may_accumulate:
            metrics = self.accumulate().metrics
            found = last_cotangents(self.backend) if isinstance(self.backend, Backend) else None
            own = None if found is None else [found[i].double() for i in range(len(self.data))]
            return Signal(metrics, own)
        if not isinstance(self.loss, (str, Loss)):
            return Signal({}, None)
        return Signal(self.backend.forward(self.data, self.loss, self.config).result().metrics, None)

    def accumulate(self) -> ForwardBackwardOutput:
        """Add the gradient of the loss."""
        if not self.undoes_gradients:
            self.left = "the gradient of the loss was added"
        with forward_order(getattr(self.backend, "model", None)) as self._order:
            if isinstance(self.loss, (str, Loss)):
                return self.backend.forward_backward(self.data, self.loss, self.config).result()
            return self.backend.forward_backward_custom(self.data, self.loss).result()

    def gradients(self) -> Mapping[str, Tensor] | None:
        """Return what has accumulated, by parameter in forward order, as the step would have it; None: cannot be read."""
        if not isinstance(self.backend, Backend):
            return None
        try:
            found = self.backend.gradients()
        except UnsupportedError:
            return None
        return {name: found[name] for name in dict.fromkeys((*self._order, *found)) if name in found}

    def change(self, before: Sequence[Tensor], params: AdamParams) -> tuple[list[Tensor], list[Tensor], float]:
        """Make a step; return the log-probs after it, how they have changed, and the norm of the gradient (NaN: not told)."""
        if not self.undoes_steps:
            self.left = "optimizer steps were made; load a checkpoint to go back"
        metrics = self.backend.optim_step(params).result().metrics
        after = self.logprobs()
        told = [value for name, value in metrics.items() if name.split(":")[0].endswith("grad_norm")]
        return after, [x - y for x, y in zip(after, before, strict=True)], next(iter(told), float("nan"))

    def _use_up(self) -> None:
        """Leave no gradient behind for somebody else's step."""
        if not self.left.startswith("the gradient"):
            return
        with suppress(UnsupportedError):
            self.backend.discard_gradients()
            self.left = ""
            return
        self.backend.optim_step(AdamParams(learning_rate=0.0)).result()
        self.left = "a step with learning rate 0 has used up a gradient; it is in the optimizer's moments"


def dtype_of(backend: object) -> str:
    """Return the dtype of a backend's weights, ``float32`` where nobody knows."""
    model: Any = getattr(backend, "model", None)
    if hasattr(model, "head"):
        weight: Tensor = model.head().weight
        return str(weight.dtype).removeprefix("torch.")
    table = getattr(backend, "table", None)
    return str(table.dtype).removeprefix("torch.") if isinstance(table, Tensor) else str(torch.float32)[6:]
