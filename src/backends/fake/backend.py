"""FakeBackend: the whole protocol on a table of logits, in closed form. For tests of training loops, and of backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

from torch import Tensor

from ...datums.types import Datum, ModelInput
from ...losses.base import Counts, Loss
from ..arguments import as_loss
from ..custom import custom_name
from ..futures import FinishedFuture
from ..operations import Operations
from ..protocol import CustomLoss, NormalizationMode
from ..reference import ReferenceView
from ..types import AdamParams, ForwardBackwardOutput, OptimStepOutput, Plan, Rollout, SamplingParams, SaveStateOutput
from .engine import Engine

__all__ = ["Call", "FakeBackend"]

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Call:
    """One operation that was asked of a `FakeBackend`: its verb, its loss or checkpoint, and how many datums it had."""

    operation: str
    name: str = ""
    datums: int = 0


@final
class FakeBackend:
    """A trainer without a model: exact, instant, deterministic, and it writes down what was asked of it.

    The log-prob of a token depends on the token before it alone, by a table of logits. All rules of a backend hold (order,
    windows, normalisation, validation, errors), and gradient and step are closed forms that use no autograd: what another
    backend should do can be compared with it.

    Args:
        vocab_size: V.
        seed: of the table and of sampling.
        faults: an error to raise in place of an operation, by its number from 1, e.g. ``{3: TimeoutError("lost")}``.
        stop: token ids that end a sampled completion.

    Attributes:
        calls: every operation, in order.
    """

    def __init__(
        self,
        vocab_size: int = 17,
        *,
        seed: int = 0,
        faults: Mapping[int, Exception] | None = None,
        stop: Sequence[int] = (),
    ) -> None:
        self.calls: list[Call] = []
        self._faults = dict(faults or {})
        self._engine = Engine(vocab_size, seed, stop)
        self._operations = Operations(self._engine)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._engine.vocab_size

    @property
    def weights_version(self) -> int:
        """Optimizer steps so far."""
        return self._engine.weights_version

    @property
    def table(self) -> Tensor:
        """A copy of the logits by previous token, fp64 [V, V]."""
        return self._engine.model.logits.clone()

    def gradients(self, grad_accumulation_normalization: NormalizationMode = None) -> dict[str, Tensor]:
        """Return the window's gradient, divided as ``optim_step`` would divide it."""
        divisor = self._engine.ledger.divisor(grad_accumulation_normalization).value or 1.0
        return {} if self._engine.gradient is None else {"table": self._engine.gradient / divisor}

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> FinishedFuture[ForwardBackwardOutput]:
        """Score all target tokens and evaluate a registered loss; no gradient."""

        def work() -> ForwardBackwardOutput:
            return self._engine.forward(self._engine.model, data, loss_fn, loss_fn_config)

        return self._run(Call("forward", _name(loss_fn), _size(data)), work)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss,
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        counts: Counts | None = None,
    ) -> FinishedFuture[ForwardBackwardOutput]:
        """Add the gradient of a registered loss to the window; ``counts``: divide now, by the totals of the step."""

        def work() -> ForwardBackwardOutput:
            return self._engine.registered(data, as_loss(loss_fn, loss_fn_config), counts)

        return self._run(Call("forward_backward", _name(loss_fn), _size(data)), work, True)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss
    ) -> FinishedFuture[ForwardBackwardOutput]:
        """Add the gradient of any function of the log-probs to the window."""

        def work() -> ForwardBackwardOutput:
            if isinstance(loss_fn, Loss):
                return self._engine.registered(data, loss_fn, None)
            return self._engine.custom(data, loss_fn)

        return self._run(Call("forward_backward_custom", _name(loss_fn), _size(data)), work, True)

    def optim_step(
        self, params: AdamParams, grad_accumulation_normalization: NormalizationMode = None
    ) -> FinishedFuture[OptimStepOutput]:
        """Divide the window's gradient once, clip it, make one AdamW step and open a new window."""
        return self._run(Call("optim_step"), lambda: self._engine.step(params, grad_accumulation_normalization))

    def discard_gradients(self) -> None:
        """Empty the window, spoiled or not. Its failures count as read."""
        for failure in list(self._engine.failures):
            self._operations.read(failure)
        self._engine.clear()

    def plan(self, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum]) -> Plan:
        """Say what would be done."""
        tokens = sum(len(datum.model_input) for datum in data)
        if not isinstance(loss_fn, (str, Loss)):
            return Plan("single_pass", "a function sees all log-probs of its call", tokens=tokens, scored=tokens)
        loss = as_loss(loss_fn, None)
        missing = [key for key in loss.required_inputs if any(key not in d.loss_fn_inputs for d in data)]
        if missing:
            return Plan("refuse", f"{loss.name} needs {', '.join(missing)}, which the data lacks")
        return Plan("native", f"{loss.name} by name", tokens=tokens, scored=tokens)

    def reference(self) -> ReferenceView:
        """Return a forward-only view of the table as it was at first."""

        def forward(
            data: Sequence[Datum], loss_fn: str | Loss, config: Mapping[str, Any] | None
        ) -> FinishedFuture[ForwardBackwardOutput]:
            work = Call("reference", _name(loss_fn), _size(data))
            return self._run(work, lambda: self._engine.forward(self._engine.base, data, loss_fn, config))

        return ReferenceView(forward)

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> FinishedFuture[list[Rollout]]:
        """Draw ``n`` completions of each prompt, prompt-major."""
        return self._run(Call("sample", datums=_size(prompts)), lambda: self._engine.sample(prompts, n, params))

    def save_state(self, name: str, *, overwrite: bool = False) -> FinishedFuture[SaveStateOutput]:
        """Keep everything in memory under a name."""

        def work() -> SaveStateOutput:
            self._engine.save(name, overwrite)
            return SaveStateOutput(name)

        return self._run(Call("save_state", name), work)

    def load_state(self, path: str) -> FinishedFuture[None]:
        """Load the table only; the optimizer starts cold."""
        return self._run(Call("load_state", path), lambda: self._engine.load(path, everything=False))

    def load_state_with_optimizer(self, path: str) -> FinishedFuture[None]:
        """Load everything: the next step is what it would have been."""
        return self._run(Call("load_state_with_optimizer", path), lambda: self._engine.load(path, everything=True))

    def close(self) -> None:
        """Refuse what follows.

        Raises:
            UnreadFailureError: an operation failed and nobody read its error.
        """
        if not self._operations.closed:
            self._engine.clear()
            self._operations.close()

    def _run(self, call: Call, work: Callable[[], T], gradient: bool = False) -> FinishedFuture[T]:
        self.calls.append(call)
        fault = self._faults.pop(len(self.calls), None)

        def scripted() -> T:
            if fault is not None:
                raise fault
            return work()

        return self._operations.run(call.operation, scripted, gradient)


def _name(loss: object) -> str:
    return loss if isinstance(loss, str) else loss.name if isinstance(loss, Loss) else custom_name(loss)


def _size(data: object) -> int:
    return len(data) if isinstance(data, Sequence) else 0
