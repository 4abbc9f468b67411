"""What accumulates at a service that only adds gradients up: what was sent, what is held back, and who divides it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from ...datums.types import Datum, TensorData
from ...errors import BackendError, UnsupportedError
from ...losses.registry import config_of
from ..calls.cotangents import Cotangents
from ..calls.prepared import PreparedCall
from ..calls.requests import scored
from ..operations.call_record import CallRecord
from ..operations.normalization import Divisor, Ledger
from ..protocol import NormalizationMode
from ..types import Plan
from .capabilities import Capabilities
from .sdk.error_mapping import final_answer

__all__ = ["RemoteAccumulator", "weighted_datums"]


@final
@dataclass
class RemoteAccumulator:
    """Everything between two optimizer steps.

    Args:
        capabilities: of the service.
        deferred: cotangents are held back until the step, which then divides by anything.
        ledger: returns the records of all calls since the last step.

    Attributes:
        held_back: datums and cotangents that have not been sent.
        restored: a checkpoint was loaded that may have brought gradients, of which only the service knows.
        lost: why nobody knows what became of an operation that ended inside a call.
    """

    capabilities: Capabilities
    deferred: bool
    ledger: Callable[[], Ledger]
    held_back: list[tuple[Datum, Tensor]] = field(default_factory=list)
    restored: bool = False
    lost: str | None = None

    @property
    def named_mean(self) -> str | None:
        """Name of the mean that the service counts, and divides at the step."""
        return self._first(lambda call: call.by_name and call.waits)

    @property
    def counted_mean(self) -> str | None:
        """Name of the mean that is counted here, and that the service is told to divide."""
        return self._first(lambda call: not call.by_name and call.waits)

    @property
    def own_count(self) -> str | None:
        """Name of the mean that was divided by its own count and must therefore stay alone."""
        return self._first(lambda call: call.mean and not call.waits)

    @property
    def unknown(self) -> str | None:
        """Why nobody knows what the service holds; None: it is known."""
        doubtful = (call.error for call in self.ledger().calls if call.state == "unknown")
        return self.lost or next((_doubt(error) for error in doubtful if error is not None), None)

    def by_name(self, call: PreparedCall) -> bool:
        """Whether the service is to compute this loss: it knows it, and has to know nothing else."""
        loss = call.registered
        if loss is None or not call.by_name or call.counts is not None or self.deferred or self.counted_mean:
            return False
        return self.capabilities.knows(loss) and config_of(loss) is not None

    def denominator(self, call: PreparedCall) -> str:
        """Return what the gradient of a call will wait to be divided by.

        Raises:
            UnsupportedError: a mean would need a division that cannot be made any more.
        """
        if self.deferred:
            return call.denominator
        mean = call.denominator != "none"
        if mean and self.capabilities.takes_divisor:
            if self.named_mean and not self.by_name(call):
                raise UnsupportedError(
                    f"{call.name}: the service counts what it divides {self.named_mean} by, and this call is counted "
                    "here; give both to forward_backward, or both to forward_backward_custom"
                )
            return call.denominator
        already = self.ledger().added
        if self.own_count is not None or (mean and already and not self.by_name(call)):
            raise UnsupportedError(
                f"{call.name}: this service adds gradients up and cannot divide at optim_step, and it already has those of "
                f"{self.own_count or already[0].loss}; make it one call, give counts={{...}} with the totals of the "
                "whole step, or connect with defer_backward=True"
            )
        return call.denominator if self.by_name(call) else "none"

    def hold_back(self, call: PreparedCall, cotangents: Cotangents) -> None:
        """Keep a gradient here until the step."""
        if cotangents.tokens:
            self.held_back += [(scored(call.data[i]), c) for i, c in cotangents.by_datum.items()]

    def require_known(self) -> None:
        """Check that it is known what the service holds.

        Raises:
            BackendError: it is not.
        """
        if self.unknown is not None:
            raise BackendError(f"{self.unknown}; load the last checkpoint, or begin again")

    @property
    def settled_there(self) -> bool:
        """Whether the service may hold gradients, and knows itself whether they are empty and what divides them."""
        return self.capabilities.divides and (self.restored or (bool(self.ledger().added) and not self.deferred))

    def require_saveable(self) -> None:
        """Check that a checkpoint of the service would hold all that the next step depends on.

        Raises:
            BackendError: it is not known what the service holds.
            UnsupportedError: gradients have accumulated, of which something would be missing.
        """
        if self.unknown is not None:
            raise BackendError(
                f"{self.unknown}, and a checkpoint would hold what the service holds; load the last checkpoint, or "
                "begin again (backend.trainer.save_state(name) saves all the same: its weights alone, by load_state, are sound)"
            )
        if calls := self.ledger().added:
            here = f"the cotangents of {len(self.held_back)} datums, and what" if self.held_back else "what"
            raise UnsupportedError(
                f"save_state between a gradient (of {calls[-1].loss}) and its step: {here} divides and may join them is kept "
                "here, where a checkpoint of the service does not reach; call optim_step first"
            )

    def interrupted(self, operation: str) -> None:
        """Note an operation that was interrupted (Ctrl-C) when it may have been sent."""
        self.lost = f"{operation} was interrupted, so nobody knows whether the service has carried it out"

    def sending_failed(self, error: BaseException, parts: int) -> None:
        """Note that a gradient, in so many requests, got no answer, unless a final one says that the service has none of it."""
        if parts > 1 or not final_answer(error):
            self.lost = _doubt(error)

    def step_failed(self, error: BaseException) -> None:
        """Note a step that failed: whatever the answer, nobody knows whether the service has kept its gradient."""
        self.lost = f"an optimizer step failed, so the service may still hold the gradient that it was of ({error})"

    def divisor(self, ledger: Ledger, mode: NormalizationMode) -> Divisor:
        """Return what is divided here, and what the service is asked for.

        Raises:
            UnsupportedError: nobody can make this division.
            DoubleNormalizationError: a normalising mode on top of a mean loss.
        """
        divisor, mode = ledger.divisor(mode), ledger.resolve(mode)
        if self.deferred:
            return divisor
        if mode is not None and not self.capabilities.normalizes:
            raise UnsupportedError(
                f"this service has no normalisation, so {mode!r} must be applied here: connect with defer_backward=True"
            )
        if isinstance(mode, (int, float)) and not self.capabilities.takes_divisor:
            raise UnsupportedError(
                f"this service takes no number to divide by, so {mode!r} must be applied here: connect with defer_backward=True"
            )
        if self.counted_mean is not None:
            return Divisor(1.0 if divisor.value else 0.0, f"{divisor.reason}, at the service", divisor.value or None)
        if mode is not None or ledger.denominator not in (None, "none"):
            return Divisor(1.0, f"{mode or ledger.denominator}, at the service", mode)
        return Divisor(1.0, f"{self.own_count} by its own count" if self.own_count else divisor.reason)

    def plan(self, call: PreparedCall) -> Plan:
        """Say which way a gradient call would go, and what it would cost there; nothing is sent."""
        tokens = sum(len(datum.model_input) for datum in call.data)
        cost: dict[str, Any] = {"tokens": tokens, "scored": tokens}
        if self.by_name(call):
            reason = f"the service computes {call.name} by name: one forward and one backward there"
            return Plan("native", reason, **cost)
        way = "forward there, the loss here, its cotangent back as the weights of a cross-entropy"
        if self.capabilities.keeps_graphs and not self.deferred:
            return Plan("single_pass", f"{way}; the service keeps the forward's graph for it", **cost)
        why = "held back until optim_step" if self.deferred else "the service runs the forward twice"
        return Plan("two_passes", f"{way}; {why}", recomputed=tokens, **cost)

    def clear(self) -> None:
        """Begin anew."""
        self.held_back, self.restored = [], False

    def _first(self, chosen: Callable[[CallRecord], bool]) -> str | None:
        """Return the name of the first loss among some of those whose gradients have accumulated."""
        return next((call.loss for call in self.ledger().added if chosen(call)), None)


def _doubt(error: BaseException) -> str:
    if final_answer(error):
        return f"a gradient was sent in several requests and one of them failed, so the service may hold a part of it ({error})"
    return f"a gradient was sent and got no final answer, so the service may hold it or not ({error})"


def weighted_datums(held_back: Sequence[tuple[Datum, Tensor]], divisor: float) -> list[Datum]:
    """Return datums whose cross-entropy has the gradient that was held back: ``weights = -cotangent / divisor``."""
    return [
        Datum(
            datum.model_input,
            {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": TensorData((-cotangent / divisor).float()),
            },
        )
        for datum, cotangent in held_back
    ]
