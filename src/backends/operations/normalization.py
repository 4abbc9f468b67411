"""What has accumulated since the last optimizer step, and by what one number it will be divided."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from ...errors import ConfigError, DoubleNormalizationError, IncompleteUnitError, MixedDenominatorsError
from ...losses.counts import not_positive
from ..protocol import NormalizationMode
from ..types import LedgerEntry
from .call_record import CallRecord

__all__ = ["Divisor", "Ledger"]


@final
@dataclass(frozen=True)
class Divisor:
    """The one number by which the accumulated gradient is divided, and why.

    Attributes:
        value: the number that the engine divides by.
        reason: in words, e.g. ``tokens over 7 calls``.
        elsewhere: the normalisation that is left to a service.
    """

    value: float
    reason: str
    elsewhere: NormalizationMode = None


@final
@dataclass
class Ledger:
    """The gradient operations since the last optimizer step; one that is known to have failed counts nowhere.

    Attributes:
        calls: one record per operation.
        operations: gradient operations ever, which number the entries.
    """

    calls: list[CallRecord] = field(default_factory=list)
    operations: int = 0

    @property
    def added(self) -> list[CallRecord]:
        """The operations whose gradients have accumulated, as far as anybody here has learned."""
        return [call for call in self.calls if call.state != "failed"]

    @property
    def entries(self) -> list[LedgerEntry]:
        """One per operation."""
        return [call.entry for call in self.added]

    @property
    def declared(self) -> list[str | None]:
        """For each, the normalisation that its loss declares (None: a mean; ``function``: unknown)."""
        return [call.declared for call in self.added]

    @property
    def counts(self) -> dict[tuple[str, str], float]:
        """Totals of the step that calls have given, by loss and denominator."""
        return {(call.loss, key): total for call in self.added for key, total in call.counts.items()}

    @property
    def groups(self) -> set[tuple[str, int]]:
        """Loss and id of the groups whose gradients a mean over groups has."""
        return {(call.loss, group) for call in self.added for group in call.groups}

    @property
    def deferred(self) -> str:
        """The loss, with its hyperparameters, whose mean waits to be divided; empty before the first."""
        return next((call.described for call in reversed(self.added) if call.waits), "")

    @property
    def tokens(self) -> int:
        """Tokens with a non-zero cotangent."""
        return sum(entry.tokens for entry in self.entries)

    @property
    def sequences(self) -> int:
        """Sequences with a non-zero cotangent."""
        return sum(entry.sequences for entry in self.entries)

    @property
    def denominator(self) -> str | None:
        """What the accumulated gradient waits to be divided by; None before the first."""
        return self._divided[0].denominator if self._divided else None

    @property
    def _divided(self) -> list[LedgerEntry]:
        """The operations that a division matters to: all but sums without a gradient, as of a loss that failed elsewhere."""
        return [entry for entry in self.entries if entry.tokens or entry.denominator != "none"]

    def admit(self, name: str, denominator: str, loss: str = "") -> None:
        """Check that a gradient with this denominator can join.

        Args:
            name: of the loss.
            denominator: what it is divided by later.
            loss: the loss with its hyperparameters.

        Raises:
            MixedDenominatorsError: another denominator has been deferred already, or the mean of another loss: calls of one
                loss are parts of one mean, but two losses are added, each with a count of its own.
        """
        if self.denominator not in (None, denominator):
            raise MixedDenominatorsError(
                f"{name} is divided by {_words(denominator)}, but gradients have accumulated that are to be divided by "
                f"{_words(self.denominator)} (from {self._divided[0].loss}): one division cannot serve both; "
                "call optim_step first, or give counts={...} with the totals of the whole step to both calls"
            )
        if denominator != "none" and self.deferred and loss and loss != self.deferred:
            raise MixedDenominatorsError(
                f"{loss} and {self.deferred} are two means of one step: their common count would divide each by too much; "
                "call optim_step first, or give counts={...} with the totals of the whole step to all calls"
            )

    def admit_units(self, name: str, counts: Mapping[str, float], groups: Collection[int]) -> None:
        """Check that a call agrees with those before it on the totals of the step, and cuts none of their groups.

        Raises:
            ConfigError: two calls say different totals.
            IncompleteUnitError: a group lies in two calls, so that each would weigh its tokens as if they were all.
        """
        told, known = self.counts, self.groups
        for key, total in counts.items():
            before = told.get((name, key), total)
            if before != total:
                raise ConfigError(
                    f"{name} says that the step has {total:g} {key}, an earlier call said {before:g}; give all of them the "
                    "total of the whole step"
                )
        cut = sorted(group for group in groups if (name, group) in known)
        if cut:
            raise IncompleteUnitError(
                f"{name}: groups {cut} lie in this call and in an earlier one; a mean over groups needs each group whole"
            )

    def record(
        self, *, loss: str, datums: int, tokens: int, sequences: int, denominator: str, count: float, **said: Any
    ) -> None:
        """Note an operation whose gradient has been added or sent; ``said`` are the other fields of its `CallRecord`."""
        self.operations += 1
        entry = LedgerEntry(self.operations, loss, datums, tokens, sequences, denominator, count)
        self.calls.append(CallRecord(entry, **said))

    def emptied(self) -> Ledger:
        """Return the ledger of the next step."""
        return Ledger(operations=self.operations)

    def divisor(self, mode: NormalizationMode) -> Divisor:
        """Return what the gradient must be divided by.

        Raises:
            DoubleNormalizationError: a normalising mode on top of a mean loss.
            ConfigError: the mode is unknown, or ``auto`` cannot be answered.
        """
        mode = self.resolve(mode)
        if mode is None:
            return self._deferred()
        given = isinstance(mode, (int, float)) and not isinstance(mode, bool) and 0 < mode < float("inf")
        if not given and mode not in ("num_loss_tokens", "num_sequences"):
            raise ConfigError(
                "grad_accumulation_normalization must be None, 'auto', 'num_loss_tokens', 'num_sequences' or a number above 0, "
                f"got {mode!r}"
            )
        means = [call.loss for call in self.added if call.declared is None]
        if means:
            raise DoubleNormalizationError(
                f"{means[0]} is already a mean; {mode!r} would divide a second time; leave "
                "grad_accumulation_normalization unset, or give the loss aggregation='sum'"
            )
        if given:
            return Divisor(float(mode), f"{mode:g}, as given")
        count = self.tokens if mode == "num_loss_tokens" else self.sequences
        return Divisor(float(count), f"{mode} over {_calls(self.entries)}")

    def resolve(self, mode: NormalizationMode) -> NormalizationMode:
        """Return the mode that ``auto`` stands for here, any other mode as it is.

        Raises:
            ConfigError: the losses do not say, or disagree.
        """
        if mode != "auto":
            return mode
        modes = set(self.declared)
        if "function" in modes:
            raise ConfigError(
                "'auto' needs registered losses: a function does not say whether it returns a sum or a mean; "
                "name the mode, or None"
            )
        if len(modes) > 1:
            raise ConfigError(
                f"'auto' found losses of different normalisations in one accumulation: {sorted(map(str, modes))}"
            )
        declared = modes.pop() if modes else None
        return declared  # type: ignore[return-value]  # `function` was refused above

    def to_json(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        counts = [[loss, key, total] for (loss, key), total in self.counts.items()]
        units = {"counts": counts, "groups": sorted(map(list, self.groups)), "deferred": self.deferred}
        return {"ledger": [asdict(entry) for entry in self.entries], "fitting": list(self.declared), **units}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], operations: int = 0) -> Ledger:
        """Read what `to_json` wrote."""
        calls = [
            CallRecord(LedgerEntry(**entry), declared)
            for entry, declared in zip(saved["ledger"], saved["fitting"], strict=True)
        ]
        return cls([_with_units(call, saved) for call in calls], operations)

    def _deferred(self) -> Divisor:
        if self.denominator in (None, "none"):
            return Divisor(1.0, "nothing")
        total = sum(entry.count for entry in self._divided)
        if self.denominator == "weight_sum" and total <= 0 and self.tokens:
            raise not_positive(total)
        return Divisor(total, f"{self.denominator} over {_calls(self._divided)}")


def _with_units(call: CallRecord, saved: Mapping[str, Any]) -> CallRecord:
    """Return a call with what a checkpoint keeps of all calls of its loss together."""
    return replace(
        call,
        described=saved.get("deferred", "") if call.waits else "",
        counts={key: total for loss, key, total in saved.get("counts", ()) if loss == call.loss},
        groups=frozenset(group for loss, group in saved.get("groups", ()) if loss == call.loss),
    )


def _calls(ledger: list[LedgerEntry]) -> str:
    return f"{len(ledger)} call{'s' if len(ledger) != 1 else ''}"


def _words(denominator: str | None) -> str:
    return "nothing" if denominator in (None, "none") else f"the number of {denominator}"
