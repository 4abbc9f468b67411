"""The gradient window of a service that has none: what was sent, what is held, and who divides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from ...datums.types import Datum
from ...errors import BackendError, RemoteError, UnsupportedError
from ...losses.base import Counts, Loss
from ...losses.registry import config_of
from ..cotangents import Cotangents
from ..normalization import Divisor, Ledger
from ..operations import spoiled
from ..protocol import CustomLoss, NormalizationMode
from ..types import ForwardBackwardOutput, LedgerEntry
from .capabilities import Capabilities
from .futures import RemoteFuture

__all__ = ["RemoteWindow"]


@final
@dataclass
class RemoteWindow:
    """Everything between two optimizer steps.

    Args:
        capabilities: of the service.
        deferred: cotangents are held here until the step, which then divides by anything.

    Attributes:
        ledger: the operations.
        futures: of gradient operations; each must end well, or its error must be read, before a step.
        held: cotangents that have not been sent.
        own: name of the mean that was divided by its own count and must therefore stay alone.
        torn: why the service may hold a part of a window.
    """

    capabilities: Capabilities
    deferred: bool
    ledger: Ledger = field(default_factory=Ledger)
    futures: list[RemoteFuture[ForwardBackwardOutput]] = field(default_factory=list)
    held: list[Cotangents] = field(default_factory=list)
    own: str | None = None
    torn: str | None = None

    def by_name(self, loss: Loss, counts: Counts | None) -> bool:
        """Whether the service is to compute this loss: it knows it, and has to know nothing else."""
        return self.capabilities.knows(loss) and counts is None and not self.deferred and config_of(loss) is not None

    def check_here(self, loss: str | Loss | CustomLoss, name: str, counts: Counts | None) -> None:
        """Check that a gradient whose cotangent is computed here can join.

        Raises:
            UnsupportedError: a mean would need a division that cannot be made any more.
            MixedDenominatorsError: two denominators wait for one division.
        """
        mean = _is_mean(loss, counts)
        if self.deferred:
            self.ledger.admit(name, loss.main_aggregation.denominator if mean and isinstance(loss, Loss) else "none")
        elif self.own is not None or (mean and self.ledger.entries):
            raise UnsupportedError(
                f"{name}: this service adds gradients up and cannot divide at optim_step, and the window already holds "
                f"{self.own or self.ledger.entries[0].loss}; make it one call, give counts={{...}} with the totals of the "
                "whole step, or connect with defer_backward=True"
            )

    def admit_here(self, loss: Loss | CustomLoss, name: str, counts: Counts | None) -> None:
        """Let such a gradient in; see `check_here`."""
        self.check_here(loss, name, counts)
        if not self.deferred and _is_mean(loss, counts):
            self.own = name

    def check_named(self, loss: Loss) -> None:
        """Check that a gradient that the service computes can join.

        Raises:
            UnsupportedError: the window holds a mean that was divided already.
            MixedDenominatorsError: two denominators wait for one division.
        """
        if self.own is not None:
            self.check_here(loss, loss.name, None)
        self.ledger.admit(loss.name, loss.main_aggregation.denominator)

    def record(self, held: Cotangents, deferred: bool) -> None:
        """Note a gradient whose cotangent was computed here."""
        waits, count = (held.denominator, held.count) if deferred else ("none", 1.0)
        self._record(held.name, len(held.data), held.tokens, held.sequences, waits, count, held.fitting)

    def record_named(self, loss: Loss, data: Sequence[Datum]) -> None:
        """Note a gradient that the service computes; its tokens are those with a weight."""
        trained = [_trained(datum) for datum in data]
        sequences = sum(1 for tokens in trained if tokens)
        waits = loss.main_aggregation.denominator
        self._record(loss.name, len(data), sum(trained), sequences, waits, 1.0, loss.normalization)

    def require_unspoiled(self) -> None:
        """Wait for all gradients of the window.

        Raises:
            PrecedingOperationFailed: one failed and its error was not read.
            BackendError: the service may hold a part of a window.
        """
        self.require_whole()
        for future in self.futures:
            error = future.settle(future.deadline)
            if error is not None:
                self.tear(error)
            if error is not None and not future.read:
                raise spoiled(error) from error
        self.require_whole()

    def require_whole(self) -> None:
        """Check that it is known what the service holds.

        Raises:
            BackendError: it is not.
        """
        if self.torn is not None:
            raise BackendError(f"{self.torn}; load the last checkpoint, or begin again")

    def tear(self, error: BaseException) -> None:
        """Note a failure after which nobody knows whether the service holds its gradient; a final answer says it does not."""
        if not isinstance(error, RemoteError) and not isinstance(error, TimeoutError):
            return
        if getattr(error, "category", "unknown") == "unknown":
            self.torn = f"a gradient was sent and got no final answer, so the service may hold it or not ({error})"

    def division(self, mode: NormalizationMode) -> tuple[Divisor, NormalizationMode]:
        """Return what is divided here, and the mode that the service is asked for.

        Raises:
            UnsupportedError: nobody can make this division.
            DoubleNormalizationError: a normalising mode on top of a mean loss.
        """
        divisor, mode = self.ledger.divisor(mode), self.ledger.resolve(mode)
        if self.deferred:
            return divisor, None
        if mode is not None and not self.capabilities.normalizes:
            raise UnsupportedError(
                f"this service has no normalisation, so {mode!r} must be applied here: connect with defer_backward=True"
            )
        if mode is not None or self.ledger.denominator not in (None, "none"):
            return Divisor(1.0, f"{mode or self.ledger.denominator}, at the service"), mode
        return Divisor(1.0, f"{self.own} by its own count" if self.own else divisor.words), None

    def clear(self) -> None:
        """Begin a new window."""
        self.ledger, self.futures, self.held, self.own = Ledger(), [], [], None

    def _record(
        self, name: str, datums: int, tokens: int, sequences: int, waits: str, count: float, fitting: str | None
    ) -> None:
        number = len(self.ledger.entries) + 1
        self.ledger.record(LedgerEntry(number, name, datums, tokens, sequences, waits, count), fitting)


def _is_mean(loss: str | Loss | CustomLoss, counts: Counts | None) -> bool:
    return isinstance(loss, Loss) and loss.main_aggregation.is_mean and counts is None


def _trained(datum: Datum) -> int:
    weights = datum.loss_fn_inputs.get("weights")
    if weights is not None:
        return int((weights.to_torch() != 0).sum())
    return datum.loss_fn_inputs["target_tokens"].to_torch().shape[0]
