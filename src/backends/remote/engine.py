"""The engine of the remote backend: a service that speaks the Tinker training API, through one of its SDKs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor

from ...datums.types import Datum, ModelInput
from ...errors import RemoteError, UnsupportedError
from ..calls.cotangents import Cotangents, evaluate_all, summarize
from ..calls.prepared import PreparedCall
from ..engine import Call, Engine, EngineLimits, Gradient
from ..operations.futures import Answer
from ..operations.normalization import Divisor, Ledger
from ..protocol import NormalizationMode
from ..types import AdamParams, Plan, Rollout, SamplingParams
from .accumulator import RemoteAccumulator, weighted_datums
from .capabilities import Capabilities, named_config, named_data
from .connection.dispatch import Dispatch
from .connection.futures import RemoteFuture, Sent
from .connection.liveness import Liveness
from .local_loss import LocalLoss
from .reduction_check import SumAudit
from .sdk.convert import bare, logprobs_of, output_of, requests_of, rollouts_of
from .sdk.error_mapping import at_service
from .sdk.sdks import Sdk

__all__ = ["RemoteEngine"]

_RECOVERS = ("load_state", "load_state_with_optimizer", "save_state", "sample", "reference")
_CHANGES = ("forward_backward", "forward_backward_custom", "optim_step")


@final
class RemoteEngine(Engine):
    """A model at a service.

    A loss that the service knows by name runs there. Every other loss, and every function, runs here on log-probs from
    the service; its cotangent goes back as the weights of a cross-entropy.

    Args:
        sdk: the SDK's ways.
        service: its ``ServiceClient``.
        trainer: its ``TrainingClient``.
        capabilities: what the service does by itself.
        defer_backward: hold cotangents back until the step.
        timeout: seconds that an answer waits; None = for ever.
        owns_service: `close` also closes the service's client.
        liveness: of the service.
        ledger: returns the records of all gradient calls since the last step.
        unload: lets the service forget a model by its id; None: it cannot be told.
    """

    def __init__(
        self,
        sdk: Sdk,
        service: Any,
        trainer: Any,
        capabilities: Capabilities,
        defer_backward: bool,
        timeout: float | None,
        owns_service: bool,
        liveness: Liveness,
        ledger: Callable[[], Ledger],
        unload: Callable[[str], None] | None = None,
    ) -> None:
        self.limits = EngineLimits(max_length=capabilities.max_length, discards=defer_backward)
        self._version = 0
        self.accumulator = RemoteAccumulator(capabilities, defer_backward, ledger)
        self._sdk, self._service, self.trainer = sdk, service, trainer
        self._capabilities, self._timeout, self._owns = capabilities, timeout, owns_service
        self._liveness, self._unload = liveness, unload
        self._dispatch = Dispatch(timeout, liveness)
        self._audit = SumAudit()
        self._sampler: Any = None
        self._last_step: RemoteFuture[Any] | None = None

    @property
    def weights_version(self) -> int:  # type: ignore[override]  # a step that was sent counts until it is known to be none
        step = self._last_step
        return self._version - (step is not None and step.arrived and _was_none(step))

    @contextmanager
    def operation(self, call: Call) -> Iterator[None]:
        self.begin(call)
        try:
            yield
        except Exception:
            raise
        except BaseException:  # what was sent goes on there, whoever waits for it
            if call.operation == "optim_step" or (call.operation in _CHANGES and not self.accumulator.deferred):
                self.accumulator.interrupted(call.operation)
            raise

    def begin(self, call: Call) -> None:
        if call.operation not in _RECOVERS:
            if self._last_step is not None and self._last_step.arrived:
                self._require_stepped()
            self.accumulator.require_known()

    @at_service("forward")
    def score(self, call: PreparedCall) -> Answer[Sequence[Tensor]]:
        request = self.trainer.forward(self._sdk.datums(bare(call.data)), "cross_entropy")
        return self._dispatch.sent([request], lambda answers: logprobs_of(answers[0]))

    def deferred_denominator(self, call: PreparedCall) -> str:
        return self.accumulator.denominator(call)

    @at_service("forward_backward")
    def accumulate(self, call: PreparedCall) -> Gradient:
        if self.accumulator.by_name(call):
            return self._by_name(call)
        return self._held_back(call) if self.accumulator.deferred else self._by_weights(call)

    def divisor(self, ledger: Ledger, mode: NormalizationMode) -> Divisor:
        self._require_stepped()  # what has been added since has waited for it
        self.accumulator.require_known()
        return self.accumulator.divisor(ledger, mode)

    def holds_nothing(self, ledger: Ledger, divisor: Divisor) -> bool:
        return not self.accumulator.settled_there and super().holds_nothing(ledger, divisor)

    @at_service("optim_step")
    def step(self, params: AdamParams, divisor: Divisor) -> Answer[Mapping[str, float] | None]:
        self._send_held_back(divisor.value)
        mode = (divisor.elsewhere or "none") if self._capabilities.normalizes else None
        try:
            request = self._sdk.step(self.trainer, params, mode)
        except Exception as error:
            self.accumulator.step_failed(error)
            raise
        self.clear()
        self._sampler = None
        self._version += 1
        answer: Sent[Mapping[str, float] | None] = self._dispatch.sent([request], self._metrics_of_step)
        self._last_step = answer.future("optim_step")
        return answer

    def _metrics_of_step(self, answers: list[Any]) -> Mapping[str, float] | None:
        """Read the answer to a step; a service of ours leaves out the learning rate where it had nothing to step on."""
        metrics = dict(answers[0].metrics or {})
        return None if self._capabilities.divides and "learning_rate" not in metrics else metrics

    def clear(self) -> None:
        self.accumulator.clear()

    def snapshot(self, weights: bool) -> Callable[[], None]:
        if weights or not self.accumulator.deferred:
            raise UnsupportedError(
                "the weights, and gradients that were sent, lie at the service: nothing undoes a call there"
            )
        kept = self.accumulator.held_back, self.accumulator.restored
        self.clear()

        def restore() -> None:
            self.accumulator.held_back, self.accumulator.restored = kept

        return restore

    def plan(self, call: PreparedCall) -> Plan:
        self.accumulator.require_known()
        return self.accumulator.plan(call)

    @at_service("sample")
    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> Answer[list[Rollout]]:
        if self._sampler is None:
            with self._liveness.explaining("sample", self._timeout):
                self._sampler = self._sdk.sampler(self.trainer, self._timeout)
        version, each = self.weights_version, [(p, params.for_prompt(i)) for i, p in enumerate(prompts)]
        requests = [self._sdk.sample(self._sampler, prompt, n, how) for prompt, how in each]
        return self._dispatch.sent(requests, lambda answers: rollouts_of(answers, params, version))

    @at_service("save_state")
    def save(self, name: str, overwrite: bool, ledger: Ledger) -> Answer[str]:
        self._require_stepped()  # what it was to use up would be saved with the weights
        self.accumulator.require_saveable()
        request = self._sdk.save(self.trainer, name, overwrite)
        return self._dispatch.sent([request], lambda answers: str(answers[0].path))

    @at_service("load_state")
    def load(self, path: str, everything: bool) -> Ledger:
        with self._liveness.explaining("load_state", self._timeout):
            before = self.trainer
            self.trainer = self._sdk.load(self._service, before, path, everything, self._timeout)
        if self._unload is not None and self.trainer is not before and self._dispatch.idle:
            self._unload(before.model_id)  # or it would take the place of another until the session ends
        self._sampler = self._last_step = None
        self.clear()
        self.accumulator.lost, self.accumulator.restored = None, everything
        return Ledger()

    @at_service("close")
    def close(self, timeout: float | None = None) -> None:
        self.clear()
        if not self._owns:
            return
        self._owns = False
        self._liveness.end(lambda: self._sdk.close(self._service, self.trainer), timeout)

    def _require_stepped(self) -> None:
        """Wait for the last step, and take note if it has failed: what it was to use up may be there still."""
        step = self._last_step
        if step is None:
            return
        error = step.settle(self._timeout)
        step.retrieved, self._last_step = True, None  # the user has a future of it
        if error is not None:
            self.accumulator.step_failed(error)
        elif _was_none(step):
            self._version -= 1

    def _by_name(self, call: PreparedCall) -> Gradient:
        loss = call.registered
        assert loss is not None, "see RemoteAccumulator.by_name"
        wire = self._sdk.datums(named_data(call.data, loss, self._capabilities))
        parts = requests_of(self.trainer, wire)
        with self._sending(parts):
            request = self.trainer.forward_backward(wire, loss.name, named_config(loss, self._capabilities))
        output = self._dispatch.sent(
            [request], lambda answers: self._audit.named(loss, call.data, output_of(answers[0])), parts
        )
        trained = [_trained(datum) for datum in call.data]
        return Gradient(output, sum(trained), sum(1 for n in trained if n), call.denominator, 1.0)

    def _by_weights(self, call: PreparedCall) -> Gradient:
        """Forward there, the loss here, the cotangent back: the SDK's own custom call."""
        local = LocalLoss(call, self._capabilities)
        wire = self._sdk.datums(bare(call.data))
        with self._sending(requests_of(self.trainer, wire)):
            answer = self._dispatch.wait(self.trainer.forward_backward_custom(wire, local), call.name)
        if local.error is not None:
            raise local.error
        assert local.cotangents is not None
        if self._capabilities.max_weight_sum is None:
            self._audit.check(answer.metrics, [-c for c in local.sent], logprobs_of(answer))
        sent = None if self._capabilities.takes_divisor else local.sent
        return _gradient(call, local.logprobs, local.cotangents, sent)

    def _held_back(self, call: PreparedCall) -> Gradient:
        request = self.trainer.forward(self._sdk.datums(bare(call.data)), "cross_entropy")
        logprobs = logprobs_of(self._dispatch.wait(request, "forward"))
        cotangents = evaluate_all(call, logprobs)
        self.accumulator.hold_back(call, cotangents)
        return _gradient(call, logprobs, cotangents)

    def _send_held_back(self, divisor: float) -> None:
        """Send what was held back, as one operation."""
        held_back = self.accumulator.held_back
        self._capabilities.require_fits([c / divisor for _, c in held_back])
        if held_back:
            weighted = self._sdk.datums(weighted_datums(held_back, divisor))
            with self._sending(requests_of(self.trainer, weighted)):
                self._dispatch.wait(self.trainer.forward_backward(weighted, "cross_entropy"), "forward_backward")

    @contextmanager
    def _sending(self, parts: int) -> Iterator[None]:
        """Surround what adds to the gradients at the service; note errors that leave open whether it has.

        Args:
            parts: requests on the wire.
        """
        try:
            with at_service("forward_backward"):
                yield
        except (RemoteError, TimeoutError) as error:
            self.accumulator.sending_failed(error, parts)
            raise


def _was_none(step: RemoteFuture[Any]) -> bool:
    """Whether a step that has its answer had nothing to step on."""
    return step.settle() is None and step.result() is None


def _gradient(
    call: PreparedCall, logprobs: Sequence[Tensor], cotangents: Cotangents, sent: Sequence[Tensor] | None = None
) -> Gradient:
    """Return what is to be divided at the step, or what was divided when it was ``sent``."""
    output = call.output(logprobs, summarize([cotangents]))
    waits = (cotangents.denominator, cotangents.count) if sent is None else ("none", 1.0)
    own = cotangents.by_datum if sent is None else dict(enumerate(sent))
    return Gradient(output, cotangents.tokens, cotangents.sequences, *waits, own)


def _trained(datum: Datum) -> int:
    weights = datum.loss_fn_inputs.get("weights")
    if weights is not None:
        trained = weights.to_torch() != 0
        return int(trained.reshape(len(trained), -1).any(-1).sum())
    return datum.loss_fn_inputs["target_tokens"].to_torch().shape[0]
