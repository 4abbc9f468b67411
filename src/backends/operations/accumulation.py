"""The accumulation of gradients between two optimizer steps, and what has gone wrong in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from ...errors import PrecedingOperationFailed, UnretrievedFailureError
from ..calls.prepared import PreparedCall
from ..engine import Gradient
from ..types import AdamParams, OptimStepOutput
from .futures import Outcome
from .normalization import Divisor, Ledger

__all__ = ["Accumulation", "preceding_failure", "step_output", "unretrieved"]


@final
@dataclass
class Accumulation:
    """What a backend knows of the gradients that its engine holds.

    Attributes:
        ledger: the operations whose gradients were added, or are on their way.
        outcomes: how gradient operations ended, as far as that may matter for the next step.
        last: the gradient operation that was added last, if any.
    """

    ledger: Ledger = field(default_factory=Ledger)
    outcomes: list[Outcome] = field(default_factory=list)
    last: Gradient | None = None

    def record(self, call: PreparedCall, gradient: Gradient) -> None:
        """Enter a call whose gradient has been added into the ledger."""
        self.last = gradient
        self.ledger.record(
            loss=call.name,
            datums=len(call.data),
            tokens=gradient.tokens,
            sequences=gradient.sequences,
            denominator=gradient.denominator,
            count=gradient.count,
            declared=call.declared_normalization,
            described=call.described,
            counts=call.counts or {},
            groups=call.groups,
            mean=call.denominator != "none",
            by_name=gradient.cotangents is None,
        )

    def follow(self, outcome: Outcome) -> None:
        """Note how the call that was entered last will end: it is under way elsewhere."""
        self.ledger.calls[-1] = replace(self.ledger.calls[-1], outcome=outcome)

    def require_complete(self) -> None:
        """Wait for every gradient operation, before a step that would lack one, or a checkpoint that would not know of it.

        Raises:
            PrecedingOperationFailed: one failed and its error has not been retrieved.
        """
        for outcome in self.outcomes:
            error = outcome.settle(outcome.deadline)
            if error is not None and not outcome.retrieved:
                raise preceding_failure(error) from error

    def retrieve_failures(self) -> None:
        """Count every failure as retrieved."""
        for outcome in self.outcomes:
            outcome.settle(outcome.deadline)
            outcome.retrieved = True

    def clear(self) -> None:
        """Begin anew."""
        self.ledger, self.outcomes, self.last = self.ledger.emptied(), [], None


def step_output(
    params: AdamParams, divisor: Divisor, ledger: Ledger, metrics: Mapping[str, float] | None
) -> OptimStepOutput:
    """Return the output of a step that an engine has made, or had nothing for.

    Args:
        params: hyperparameters of the step.
        divisor: by which the engine was asked to divide.
        ledger: the operations whose gradients went into it.
        metrics: the engine's; ``divided_by`` is by what a service divided besides; None: it made no step.
    """
    if metrics is None:
        return OptimStepOutput.empty(divisor.value, tuple(ledger.entries))
    divided_by = divisor.value * metrics.get("divided_by", 1.0)
    counted = {"tokens": float(ledger.tokens), "sequences": float(ledger.sequences)}
    own = {"learning_rate": params.learning_rate, **counted, **metrics, "divided_by": divided_by}
    return OptimStepOutput(own, True, divided_by, divisor.reason, tuple(ledger.entries))


def preceding_failure(cause: BaseException) -> PrecedingOperationFailed:
    """Return the refusal of a step that would lack a batch."""
    return PrecedingOperationFailed(
        f"an earlier gradient operation failed ({type(cause).__name__}: {cause}) and its error has not been retrieved, "
        "so this step would lack a batch; read that operation's .result(), or call discard_gradients()"
    )


def unretrieved(failures: Sequence[BaseException]) -> UnretrievedFailureError:
    """Return the error of a backend that is closed on failures that nobody has seen."""
    first = failures[0]
    return UnretrievedFailureError(
        f"{len(failures)} operation(s) failed and their futures were never read; the first: "
        f"{type(first).__name__}: {first}"
    )
