"""Backend: the verbs of training, once, over any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ..datums.types import Datum, ModelInput
from ..errors import BackendError, ConfigError, MixedDenominatorsError, UnsupportedError
from ..losses.base import Loss
from ..losses.counts import Counts
from .calls.losses import as_loss, loss_name, missing_inputs
from .calls.prepared import PreparedCall, prepare
from .calls.requests import Positions
from .engine import Call, Engine, Gradient
from .operations.accumulation import Accumulation, step_output
from .operations.futures import Answer, Future, then
from .operations.runner import Operations, sized
from .protocol import CustomLoss, NormalizationMode, ReferenceModel
from .reference import ReferenceView, refusal
from .sampling import check_params, check_prompts
from .types import AdamParams, ForwardBackwardOutput, OptimStepOutput, Plan, Rollout, SamplingParams, SaveStateOutput

__all__ = ["Backend"]


class Backend:
    """Trains and samples a model through an `Engine`: argument checks, order, futures, accumulation and its failures,
    normalisation and plans are here; the work is the engine's, in the order in which it is submitted.

    Args:
        engine: does the work.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._operations = Operations(engine)
        self._run = self._operations.run

    @property
    def weights_version(self) -> int:
        """Optimizer steps so far."""
        return self._engine.weights_version

    def gradients(self, grad_accumulation_normalization: NormalizationMode = None) -> dict[str, Tensor]:
        """Return copies of the accumulated gradient by parameter name, divided as ``optim_step`` would divide it."""
        divisor = self._accumulation.ledger.divisor(grad_accumulation_normalization).value or 1.0
        return {name: gradient / divisor for name, gradient in self._engine.gradients().items()}

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> Future[ForwardBackwardOutput]:
        """Score all target tokens and evaluate a registered loss; no gradient."""

        def work() -> Answer[ForwardBackwardOutput]:
            call = self._prepare(data, as_loss(loss_fn, loss_fn_config))
            return then(self._engine.score(call), call.evaluated)

        return self._run(Call("forward", loss_name(loss_fn), sized(data)), work)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss,
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        counts: Counts | None = None,
    ) -> Future[ForwardBackwardOutput]:
        """Accumulate the gradient of a registered loss.

        Args:
            data: whole units (pairs, groups).
            loss_fn: registered name, or a loss.
            loss_fn_config: hyperparameters, with a name only.
            counts: totals of the whole step by denominator, e.g. ``{"tokens": 18231}``: divide now, not at
                ``optim_step``. Needed where two denominators meet in one accumulation.

        Returns: log-probs (0.0 with a ``scored`` mask where untrained positions were skipped) and metrics.
        """

        def work() -> Answer[ForwardBackwardOutput]:
            positions: Positions = "trained" if self._engine.limits.skips_positions else "all"
            loss = as_loss(loss_fn, loss_fn_config)
            return self._accumulate(self._prepare(data, loss, counts=counts, positions=positions))

        return self._run(Call("forward_backward", loss_name(loss_fn), sized(data)), work, gradient=True)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, positions: Positions = "all"
    ) -> Future[ForwardBackwardOutput]:
        """Accumulate the gradient of any function of the log-probs.

        Args:
            data: datums; one without ``target_tokens`` is scored on its own next tokens.
            loss_fn: ``(data, logprobs_list) -> (scalar loss, metrics)``; gets fp32 CPU leaves (fp64 of an fp64 model). A
                registered loss works too, and is then divided at ``optim_step`` like any other.
            positions: ``trained`` skips positions of weight 0; they read 0.0.

        Raises (by the future):
            UnsupportedError: this backend always scores all positions.
        """

        def work() -> Answer[ForwardBackwardOutput]:
            if positions != "all" and not self._engine.limits.skips_positions:
                raise UnsupportedError(f"positions={positions!r}: this backend scores all positions; leave it out")
            return self._accumulate(self._prepare(data, loss_fn, positions=positions, by_name=False))

        return self._run(Call("forward_backward_custom", loss_name(loss_fn), sized(data)), work, gradient=True)

    def optim_step(
        self, params: AdamParams, grad_accumulation_normalization: NormalizationMode = None
    ) -> Future[OptimStepOutput]:
        """Divide the accumulated gradient once, clip it and make one AdamW step.

        Args:
            params: hyperparameters of this step.
            grad_accumulation_normalization: None: the losses' own deferred denominator, if any. ``num_loss_tokens``,
                ``num_sequences``: tokens, or sequences, with a non-zero cotangent, for raw sums; a number: that. ``auto``:
                what the registered losses declare.

        Raises (by the future):
            PrecedingOperationFailed: a gradient operation failed and its error has not been retrieved.
            DoubleNormalizationError: a normalising mode on top of a mean loss.
            NonFiniteError: the gradient is NaN or inf; nothing has changed.
            UnsupportedError: nobody can make this division.
        """

        def work() -> Answer[OptimStepOutput]:
            if not isinstance(params, AdamParams):
                raise ConfigError(f"optim_step needs AdamParams(learning_rate=...), got {type(params).__name__}")
            self._accumulation.require_complete()
            return self._step(params, grad_accumulation_normalization)

        return self._run(Call("optim_step"), work)

    def discard_gradients(self) -> None:
        """Forget what has been accumulated. Failures of its operations count as retrieved.

        Raises:
            UnsupportedError: the gradients lie where they cannot be forgotten.
        """
        with self._operations.lock.operation("discard_gradients"):
            if self._accumulation.ledger.entries and not self._engine.limits.discards:
                raise UnsupportedError(
                    "the service cannot forget gradients that it has; use defer_backward=True, or load the last checkpoint"
                )
            self._accumulation.retrieve_failures()
            self._clear()

    def plan(self, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum]) -> Plan:
        """Say what ``forward_backward`` (or ``_custom``, for a function) would do, before any work.

        Raises:
            ClosedError: the backend has been closed.
            LossError: there is no such loss.
            DatumError: the data is wrong in itself. What is missing for this loss is refused in the plan instead.
        """
        self._operations.require_open("plan")
        if not isinstance(loss_fn, (str, Loss)):
            return self._planned(self._prepare(data, loss_fn, by_name=False))
        loss = as_loss(loss_fn, None)
        missing = missing_inputs(loss, data)
        if missing:
            self._prepare(data, None)
            return Plan("refuse", refusal(loss, missing, self.reference))
        positions: Positions = "trained" if self._engine.limits.skips_positions else "all"
        return self._planned(self._prepare(data, loss, positions=positions))

    def reference(self) -> ReferenceModel:
        """Return a forward-only view of the frozen reference.

        Raises:
            MissingReferenceError: there is none.
        """
        score = self._engine.reference()

        def forward(
            data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any] | None
        ) -> Future[ForwardBackwardOutput]:
            def work() -> Answer[ForwardBackwardOutput]:
                call = self._prepare(data, as_loss(loss_fn, config))
                return then(score(call), call.evaluated)

            return self._run(Call("reference", loss_name(loss_fn), sized(data)), work)

        return ReferenceView(forward)

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> Future[list[Rollout]]:
        """Draw ``n`` completions of each prompt, prompt-major; log-probs are those of the untempered policy."""

        def work() -> Answer[list[Rollout]]:
            check_params(params, self._engine.limits.vocab_size)
            check_prompts(prompts, n, self._engine.limits.vocab_size)
            return self._engine.sample(prompts, n, params)

        return self._run(Call("sample", datums=sized(prompts)), work)

    def save_state(self, name: str, *, overwrite: bool = False) -> Future[SaveStateOutput]:
        """Write weights, optimizer, accumulation, counters and random state, atomically."""

        def work() -> Answer[SaveStateOutput]:
            self._accumulation.require_complete()
            return then(self._engine.save(name, overwrite, self._accumulation.ledger), SaveStateOutput)

        return self._run(Call("save_state", name), work)

    def load_state(self, path: str | Path) -> Future[None]:
        """Load weights only; the optimizer starts cold. Refused while gradients have accumulated."""
        return self._load("load_state", path, everything=False)

    def load_state_with_optimizer(self, path: str | Path) -> Future[None]:
        """Load everything: the next step is what it would have been without the interruption."""
        return self._load("load_state_with_optimizer", path, everything=True)

    def close(self) -> None:
        """Refuse what follows, and give back what is held.

        Raises:
            UnretrievedFailureError: an operation failed and nobody retrieved its error.
        """
        self._operations.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._operations.abandon()

    @property
    def _accumulation(self) -> Accumulation:
        return self._operations.accumulation

    def _prepare(self, data: Sequence[Datum], loss: Loss | CustomLoss | None, **options: Any) -> PreparedCall:
        limits, weights = self._engine.limits, self._engine.trained
        call = prepare(
            data, loss, vocab_size=limits.vocab_size, max_length=limits.max_length, weights=weights, **options
        )
        if not limits.tempers:
            call.require_untempered()
        return call

    def _accumulate(
        self, call: PreparedCall, add: Callable[[], Gradient] | None = None
    ) -> Answer[ForwardBackwardOutput]:
        """Add a call's gradient (by ``add``, if that is not the engine's ordinary way), and enter it into the ledger."""
        ledger = self._accumulation.ledger
        ledger.admit(call.name, self._engine.deferred_denominator(call), call.described)
        ledger.admit_units(call.name, call.counts or {}, call.groups)
        gradient = self._engine.accumulate(call) if add is None else add()
        self._accumulation.record(call, gradient)
        return gradient.output

    def _planned(self, call: PreparedCall) -> Plan:
        try:
            self._accumulation.ledger.admit(call.name, self._engine.deferred_denominator(call), call.described)
        except (MixedDenominatorsError, UnsupportedError) as error:
            return Plan("refuse", str(error))
        return self._engine.plan(call)

    def _step(self, params: AdamParams, mode: NormalizationMode) -> Answer[OptimStepOutput]:
        ledger = self._accumulation.ledger
        divisor = self._engine.divisor(ledger, mode)
        if self._engine.holds_nothing(ledger, divisor):
            self._clear()
            return OptimStepOutput.empty(divisor.value, tuple(ledger.entries))
        answer = self._engine.step(params, divisor)
        self._accumulation.clear()
        return then(answer, partial(step_output, params, divisor, ledger))

    def _clear(self) -> None:
        self._engine.clear()
        self._accumulation.clear()

    def _load(self, operation: str, path: str | Path, everything: bool) -> Future[None]:
        def work() -> None:
            if self._accumulation.ledger.entries and self._engine.limits.discards:
                raise BackendError(
                    "gradients of the present weights have accumulated; call optim_step or discard_gradients() before loading"
                )
            loaded, before = self._engine.load(str(path), everything), self._accumulation.ledger
            # Weights alone bring no history: operations are numbered on.
            self._operations.accumulation = Accumulation(loaded if everything else before.emptied())

        return self._run(Call(operation, str(path)), work)
