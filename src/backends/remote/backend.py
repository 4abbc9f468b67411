"""RemoteBackend: the protocol on a service that speaks the Tinker training API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, final

import torch
from torch import Tensor

from ...datums.convert import to_tinker
from ...datums.types import Datum, ModelInput, TensorData
from ...datums.validation import validate
from ...errors import (
    ClosedError,
    ConfigError,
    LossTypeError,
    RemoteError,
    UnreadFailureError,
    UnsupportedError,
)
from ...losses.base import Counts, Loss
from ...losses.registry import config_of
from ..arguments import as_loss
from ..cotangents import Cotangents, target_cotangents, with_cotangents
from ..custom import custom_name
from ..protocol import CustomLoss, NormalizationMode
from ..types import (
    AdamParams,
    ForwardBackwardOutput,
    OptimStepOutput,
    Plan,
    Rollout,
    SamplingParams,
    SaveStateOutput,
)
from .capabilities import Capabilities, named_data
from .convert import bare, logprobs_of, output_of, ready, rollouts_of, sampling_params, sdk, send_step
from .failures import at_service
from .futures import Pending, RemoteFuture
from .plans import plan_remote
from .reference import BaseView
from .window import RemoteWindow

__all__ = ["RemoteBackend"]

T = TypeVar("T")


@final
class RemoteBackend:
    """Trains a model at a Tinker-shaped service; the official SDK is the transport.

    A loss that the service knows by name runs there. Every other loss, and every function, runs here on log-probs from
    the service; its cotangent goes back as the weights of a cross-entropy.

    Where the service adds gradients up and has no division, a mean is divided here: by the call's own count if it is the
    only one of its window, by ``counts=`` if given, or at `optim_step` with ``defer_backward``.

    Args:
        service: ``tinker.ServiceClient``.
        trainer: ``tinker.TrainingClient``.
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
        self.capabilities = capabilities or Capabilities()
        self._defer, self._timeout, self._owns = defer_backward, timeout, owns_service
        self._window = RemoteWindow(self.capabilities, defer_backward)
        self._futures: list[RemoteFuture[Any]] = []
        self._sampler: Any = None
        self._closed = False
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
            sent = self._trainer.forward(to_tinker(bare(data)), "cross_entropy")

            def read(answers: list[Any]) -> ForwardBackwardOutput:
                logprobs = logprobs_of(answers[0])
                return _output(logprobs, loss(data, logprobs)[1])

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
            wire = to_tinker(named_data(data, loss, self.capabilities))
            sent = self._trainer.forward_backward(wire, loss.name, config_of(loss))
            self._window.record_named(loss, data)
            return Pending([sent], lambda answers: output_of(answers[0]))

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
            sent = send_step(self._trainer, params, mode, self.capabilities.normalizes)
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

    def reference(self) -> BaseView:
        """Return a forward-only view of the base model, by the service's sampler."""
        with at_service("reference"):
            sampler = self._service.create_sampling_client(base_model=self._base_model)
            return BaseView(ready(sampler, self._timeout), self._timeout)

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> RemoteFuture[list[Rollout]]:
        """Draw ``n`` completions of each prompt from the present weights."""

        def send() -> Pending[list[Rollout]]:
            if self._sampler is None:
                self._sampler = ready(self._trainer.save_weights_and_get_sampling_client(), self._timeout)
            version, tokens = self.weights_version, [sdk().ModelInput.from_ints(p.to_ints()) for p in prompts]
            given = [sampling_params(params.for_prompt(i)) for i in range(len(prompts))]
            sent = [self._sampler.sample(one, n, how) for one, how in zip(tokens, given, strict=True)]
            return Pending(sent, lambda answers: rollouts_of(answers, params, version))

        return self._run("sample", send)

    def save_state(self, name: str, *, overwrite: bool = False) -> RemoteFuture[SaveStateOutput]:
        """Write weights and optimizer at the service; the path is the service's URI."""

        def send() -> Pending[SaveStateOutput]:
            sent = self._trainer.save_state(name, **({"overwrite": True} if overwrite else {}))
            return Pending([sent], lambda answers: SaveStateOutput(answers[0].path))

        return self._run("save_state", send)

    def load_state(self, path: str) -> RemoteFuture[None]:
        """Go on from a checkpoint's weights; the optimizer starts cold."""
        return self._load("load_state", path, "create_training_client_from_state")

    def load_state_with_optimizer(self, path: str) -> RemoteFuture[None]:
        """Go on from a checkpoint, weights and optimizer."""
        return self._load("load_state_with_optimizer", path, "create_training_client_from_state_with_optimizer")

    def close(self) -> None:
        """End the use of this backend.

        Raises:
            UnreadFailureError: an operation failed and nobody read its error.
        """
        if self._closed:
            return
        self._closed = True
        self._window.clear()
        try:
            failed = [f for f in self._futures if f.settle(self._timeout) is not None and not f.read]
        finally:
            if self._owns:
                self._service.__exit__(None, None, None)  # ends the session, and waits for it
        if failed:
            error = failed[0].exception()
            raise UnreadFailureError(
                f"{len(failed)} operation(s) failed and their futures were never read; the first: "
                f"{type(error).__name__}: {error}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._owns and not self._closed:
            self._closed = True  # the error on its way out matters more than those that nobody read
            self._service.__exit__(None, None, None)

    def _run(self, operation: str, send: Callable[[], Pending[T]], gradient: bool = False) -> RemoteFuture[T]:
        """Send an operation; what is refused here comes through its future, as from everywhere else."""
        if self._closed:
            raise ClosedError(f"{operation} on a backend that has been closed")
        try:
            with at_service(operation):
                future = RemoteFuture(send(), operation, self._futures, self._timeout)
        except Exception as error:
            future = RemoteFuture.failed(error, operation)
        self._futures = [*(f for f in self._futures if not f.read), future]
        if gradient:
            self._window.futures.append(future)  # type: ignore[arg-type]  # a gradient operation's T is its output
        return future

    def _send_custom(
        self, data: Sequence[Datum], loss: Loss | CustomLoss, name: str, counts: Counts | None
    ) -> Pending[ForwardBackwardOutput]:
        self._window.admit_here(loss, name, counts)
        if self._defer:
            sent = self._trainer.forward(to_tinker(bare(data)), "cross_entropy")
            logprobs = logprobs_of(self._wait(sent, "forward", changes=False))
            held = target_cotangents(loss, name, data, logprobs, counts)
            self._window.record(held, deferred=True)
            self._window.held.append(held)
            return Pending([], lambda _: _output(logprobs, held.metrics))
        local = _Local(loss, name, data, counts)
        self._wait(self._trainer.forward_backward_custom(to_tinker(bare(data)), local), name)
        if local.error is not None:
            self._window.own = None
            raise local.error
        assert local.held is not None
        held, found = local.held, local.logprobs
        self._window.record(held, deferred=False)
        return Pending([], lambda _: _output(found, held.metrics))

    def _send_held(self, divisor: float) -> None:
        """Send what was held, as one operation."""
        weighted = [datum for held in self._window.held if held.tokens for datum in with_cotangents(held, divisor)]
        if weighted:
            self._wait(self._trainer.forward_backward(to_tinker(weighted), "cross_entropy"), "forward_backward")

    def _wait(self, sent: Any, operation: str, changes: bool = True) -> Any:
        """Wait, inside a call, for an operation; one that may have changed the window without our knowing tears it."""
        future = RemoteFuture(Pending([sent], lambda answers: answers[0]), operation, self._futures, self._timeout)
        try:
            return future.result()
        except (TimeoutError, RemoteError) as error:
            if changes:
                self._window.tear(error)
            raise

    def _check(self, data: Sequence[Datum], loss: Loss | None) -> None:
        self._window.require_whole()
        validate(
            data,
            required=() if loss is None else ("target_tokens", *loss.required_inputs),
            optional=() if loss is None else loss.optional_inputs,
            vocab_size=None,
            max_length=self.capabilities.max_length,
            known_keys=loss is not None,
            pairs=loss is not None and loss.gradient_kind == "pair",
        )

    def _load(self, operation: str, path: str, create: str) -> RemoteFuture[None]:
        def send() -> Pending[None]:
            trainer = ready(getattr(self._service, create)(path), self._timeout)
            self._trainer, self._sampler = trainer, None
            self._window.clear()
            self._window.torn = None
            return Pending([], lambda _: None)

        return self._run(operation, send)


class _Local:
    """The function that the SDK calls: it never raises, for then the SDK would refuse all later operations."""

    def __init__(self, loss: Loss | CustomLoss, name: str, data: Sequence[Datum], counts: Counts | None) -> None:
        self._loss, self._name, self._data, self._counts = loss, name, data, counts
        self.error: Exception | None = None
        self.held: Cotangents | None = None
        self.logprobs: list[Tensor] = []

    def __call__(self, _: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        cotangents = [torch.zeros_like(x) for x in logprobs]
        try:
            self.logprobs = [x.detach().clone() for x in logprobs]
            self.held = target_cotangents(self._loss, self._name, self._data, self.logprobs, self._counts)
            cotangents = [c / (self.held.count or 1.0) for c in self.held.cotangents]
        except Exception as error:
            self.error = error
        return torch.stack([(c * x).sum() for c, x in zip(cotangents, logprobs, strict=True)]).sum(), {}


def _output(logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> ForwardBackwardOutput:
    return ForwardBackwardOutput([{"logprobs": TensorData(x)} for x in logprobs], metrics)
