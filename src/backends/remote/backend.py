"""RemoteBackend: the protocol on a service that speaks the Tinker training API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, final

from ...datums.types import Datum, ModelInput
from ...errors import (
    ConfigError,
    LossTypeError,
    UnsupportedError,
)
from ...losses.base import Counts, Loss
from ...losses.registry import config_of
from ..arguments import as_loss, check_data
from ..cotangents import target_cotangents, with_cotangents
from ..custom import custom_name
from ..protocol import CustomLoss, NormalizationMode, ReferenceModel
from ..types import (
    AdamParams,
    ForwardBackwardOutput,
    OptimStepOutput,
    Plan,
    Rollout,
    SamplingParams,
    SaveStateOutput,
)
from .accumulator import RemoteWindow
from .capabilities import Capabilities, named_data
from .convert import bare, logprobs_of, output_of, rollouts_of
from .dispatch import RemoteOperations
from .error_mapping import at_service
from .futures import Pending, RemoteFuture
from .local_loss import LocalLoss
from .plan import plan_remote
from .reduction_check import SumAudit
from .sdks import sdk_of

__all__ = ["RemoteBackend"]

T = TypeVar("T")


@final
class RemoteBackend:
    """Trains a model at a Tinker-shaped service; the official SDK, or Fireworks', is the transport.

    A loss that the service knows by name runs there. Every other loss, and every function, runs here on log-probs from
    the service; its cotangent goes back as the weights of a cross-entropy.

    Where the service adds gradients up and has no division, a mean is divided here: by the call's own count if it is the
    only one of its window, by ``counts=`` if given, or at `optim_step` with ``defer_backward``.

    Args:
        service: ``ServiceClient`` of the SDK.
        trainer: ``TrainingClient`` of the SDK.
        base_model: name of the base there, for the reference.
        capabilities: what the service does by itself; default: the plain protocol.
        defer_backward: hold cotangents until `optim_step`: any split into calls, and every normalisation, as natively;
            costs a second forward.
        timeout: seconds that a result, or a call that must wait for the service, waits; None = for ever.
        owns_service: `close` also closes the service's client, which ends its session.
    """

    def __init__(
        self,
        service: Any,
        trainer: Any,
        *,
        base_model: str,
        capabilities: Capabilities | None = None,
        defer_backward: bool = False,
        timeout: float | None = None,
        owns_service: bool = False,
    ) -> None:
        self._service, self._trainer, self._base_model = service, trainer, base_model
        self._sdk = sdk_of(service)
        self.capabilities = capabilities or self._sdk.plain
        self._defer, self._timeout, self._owns = defer_backward, timeout, owns_service
        self._window = RemoteWindow(self.capabilities, defer_backward)
        self._operations = RemoteOperations(self._window, timeout)
        self._run, self._wait = self._operations.run, self._operations.wait
        self._audit = SumAudit()
        self._sampler: Any = None
        self.weights_version = 0

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> RemoteFuture[ForwardBackwardOutput]:
        """Score all target tokens there, and evaluate the loss here; no gradient."""

        def send() -> Pending[ForwardBackwardOutput]:
            loss = as_loss(loss_fn, loss_fn_config)
            self._check(data, loss)
            sent = self._trainer.forward(self._sdk.datums(bare(data)), "cross_entropy")

            def read(answers: list[Any]) -> ForwardBackwardOutput:
                logprobs = logprobs_of(answers[0])
                return ForwardBackwardOutput.of(logprobs, loss(data, logprobs)[1])

            return Pending([sent], read)

        return self._run("forward", send)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss,
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        counts: Counts | None = None,
    ) -> RemoteFuture[ForwardBackwardOutput]:
        """Add the gradient of a registered loss to the window.

        Args:
            data: whole units (pairs, groups).
            loss_fn: registered name, or a loss.
            loss_fn_config: hyperparameters, with a name only.
            counts: totals of the whole step by denominator: divide now.
        """

        def send() -> Pending[ForwardBackwardOutput]:
            loss = as_loss(loss_fn, loss_fn_config)
            self._check(data, loss)
            if not self._window.by_name(loss, counts):
                return self._send_custom(data, loss, loss.name, counts)
            self._window.check_named(loss)
            wire = self._sdk.datums(named_data(data, loss, self.capabilities))
            sent = self._trainer.forward_backward(wire, loss.name, config_of(loss))
            self._window.record_named(loss, data)
            return Pending([sent], lambda answers: self._audit.named(loss, data, output_of(answers[0])))

        return self._run("forward_backward", send, gradient=True)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss
    ) -> RemoteFuture[ForwardBackwardOutput]:
        """Add the gradient of any function of the log-probs to the window."""

        def send() -> Pending[ForwardBackwardOutput]:
            if not callable(loss_fn):
                raise LossTypeError(
                    f"loss_fn must be a function (data, logprobs_list) -> (loss, metrics), got {loss_fn!r}"
                )
            self._check(data, None)
            return self._send_custom(data, loss_fn, custom_name(loss_fn), None)

        return self._run("forward_backward_custom", send, gradient=True)

    def optim_step(
        self, params: AdamParams, grad_accumulation_normalization: NormalizationMode = None
    ) -> RemoteFuture[OptimStepOutput]:
        """Divide what is held, send it, and make one AdamW step.

        Raises (by the future):
            PrecedingOperationFailed: a gradient operation of this window failed and its error was not read.
            UnsupportedError: the normalisation needs ``defer_backward``.
            DoubleNormalizationError: a normalising mode on top of a mean loss.
        """

        def send() -> Pending[OptimStepOutput]:
            if not isinstance(params, AdamParams):
                raise ConfigError(f"optim_step needs AdamParams, got {type(params).__name__}")
            self._window.require_unspoiled()
            divisor, mode = self._window.division(grad_accumulation_normalization)
            ledger = tuple(self._window.ledger.entries)
            if self._window.ledger.tokens == 0 or divisor.value == 0:
                self._window.clear()
                words = "empty window: no token has a gradient, so no step was made"
                return Pending([], lambda _: OptimStepOutput({"tokens": 0.0}, False, divisor.value, words, ledger))
            self._send_held(divisor.value)
            sent = self._sdk.step(self._trainer, params, (mode or "none") if self.capabilities.normalizes else None)
            self._window.clear()
            self._sampler = None
            self.weights_version += 1

            def read(answers: list[Any]) -> OptimStepOutput:
                said = dict(answers[0].metrics or {})
                divided_by = divisor.value * said.get("divided_by", 1.0)
                metrics = {"learning_rate": params.learning_rate, **said, "divided_by": divided_by}
                return OptimStepOutput(metrics, True, divided_by, divisor.words, ledger)

            return Pending([sent], read)

        return self._run("optim_step", send)

    def discard_gradients(self) -> None:
        """Empty the window.

        Raises:
            UnsupportedError: gradients lie at the service, which cannot forget them; only held ones can be dropped.
        """
        if self._window.ledger.entries and not self._defer:
            raise UnsupportedError(
                "the service cannot forget gradients that it has; use defer_backward=True, or load the last checkpoint"
            )
        for future in self._window.futures:
            future.exception()
        self._window.clear()

    def plan(self, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum]) -> Plan:
        """Say which way a loss would go, before any byte is sent.

        Raises:
            LossError: there is no such loss.
            DatumError: the data is wrong in itself. What it lacks for this loss is refused in the plan instead.
        """
        self._check(data, None)
        return plan_remote(self._window, loss_fn, data)

    def reference(self) -> ReferenceModel:
        """Return a forward-only view of the base model."""
        with at_service("reference"):
            return self._sdk.reference(self._service, self._base_model, self.capabilities, self._timeout)

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> RemoteFuture[list[Rollout]]:
        """Draw ``n`` completions of each prompt from the present weights."""

        def send() -> Pending[list[Rollout]]:
            if self._sampler is None:
                self._sampler = self._sdk.sampler(self._trainer, self._timeout)
            version, each = self.weights_version, [(p, params.for_prompt(i)) for i, p in enumerate(prompts)]
            sent = [self._sdk.sample(self._sampler, prompt, n, how) for prompt, how in each]
            return Pending(sent, lambda answers: rollouts_of(answers, params, version))

        return self._run("sample", send)

    def save_state(self, name: str, *, overwrite: bool = False) -> RemoteFuture[SaveStateOutput]:
        """Write weights and optimizer at the service; the path is the service's URI."""

        def send() -> Pending[SaveStateOutput]:
            sent = self._sdk.save(self._trainer, name, overwrite)
            return Pending([sent], lambda answers: SaveStateOutput(answers[0].path))

        return self._run("save_state", send)

    def load_state(self, path: str) -> RemoteFuture[None]:
        """Go on from a checkpoint's weights; the optimizer starts cold."""
        return self._load("load_state", path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> RemoteFuture[None]:
        """Go on from a checkpoint, weights and optimizer."""
        return self._load("load_state_with_optimizer", path, optimizer=True)

    def close(self) -> None:
        """End the use of this backend.

        Raises:
            UnreadFailureError: an operation failed and nobody read its error.
        """
        if self._operations.closed:
            return
        self._window.clear()
        try:
            self._operations.close()
        finally:
            if self._owns:
                self._sdk.close(self._service, self._trainer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._owns and not self._operations.closed:
            self._operations.closed = True  # the error on its way out matters more than those that nobody read
            self._sdk.close(self._service, self._trainer)

    def _send_custom(
        self, data: Sequence[Datum], loss: Loss | CustomLoss, name: str, counts: Counts | None
    ) -> Pending[ForwardBackwardOutput]:
        self._window.admit_here(loss, name, counts)
        if self._defer:
            sent = self._trainer.forward(self._sdk.datums(bare(data)), "cross_entropy")
            logprobs = logprobs_of(self._wait(sent, "forward", changes=False))
            held = target_cotangents(loss, name, data, logprobs, counts)
            self._window.record(held, deferred=True)
            self._window.held.append(held)
            return Pending([], lambda _: ForwardBackwardOutput.of(logprobs, held.metrics))
        local = LocalLoss(loss, name, data, counts, self.capabilities)
        answer = self._wait(self._trainer.forward_backward_custom(self._sdk.datums(bare(data)), local), name)
        if local.error is not None:
            self._window.own = None
            raise local.error
        assert local.held is not None
        held, found = local.held, local.logprobs
        if self.capabilities.max_weight_sum is None:
            self._audit.check(answer.metrics, [-c for c in local.sent], logprobs_of(answer))
        self._window.record(held, deferred=False)
        return Pending([], lambda _: ForwardBackwardOutput.of(found, held.metrics))

    def _send_held(self, divisor: float) -> None:
        """Send what was held, as one operation."""
        kept = [held for held in self._window.held if held.tokens]
        self.capabilities.require_fits([c / divisor for held in kept for c in held.cotangents])
        weighted = [datum for held in kept for datum in with_cotangents(held, divisor)]
        if weighted:
            self._wait(self._trainer.forward_backward(self._sdk.datums(weighted), "cross_entropy"), "forward_backward")

    def _check(self, data: Sequence[Datum], loss: Loss | None) -> None:
        self._window.require_whole()
        check_data(data, loss, max_length=self.capabilities.max_length)

    def _load(self, operation: str, path: str, optimizer: bool) -> RemoteFuture[None]:
        def send() -> Pending[None]:
            trainer = self._sdk.load(self._service, self._trainer, path, optimizer, self._timeout)
            self._trainer, self._sampler = trainer, None
            self._window.clear()
            self._window.torn = None
            return Pending([], lambda _: None)

        return self._run(operation, send)
