"""The gradient window: what has accumulated since the last optimizer step, and by what it will be divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from ...errors import (
    ConfigError,
    DoubleNormalizationError,
    MixedDenominatorsError,
    NonFiniteError,
    PrecedingOperationFailed,
)
from ..protocol import NormalizationMode
from ..types import LedgerEntry

__all__ = ["Divisor", "Window"]


@final
@dataclass(frozen=True)
class Divisor:
    """The one number a window's gradient is divided by, and in words why."""

    value: float
    words: str


@final
@dataclass
class Window:
    """Gradients live in ``parameter.grad``; this is everything else.

    Attributes:
        parameters: the trainable parameters by name.
        ledger: one entry per gradient operation that was added.
        fitting: for each entry, the normalisation its loss declares (None: a mean; ``function``: unknown).
        failures: gradient operations that failed and whose error nobody has read.
    """

    parameters: Mapping[str, nn.Parameter]
    ledger: list[LedgerEntry] = field(default_factory=list)
    fitting: list[str | None] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens with a non-zero cotangent."""
        return sum(entry.tokens for entry in self.ledger)

    @property
    def sequences(self) -> int:
        """Sequences with a non-zero cotangent."""
        return sum(entry.sequences for entry in self.ledger)

    @property
    def denominator(self) -> str | None:
        """What the accumulated gradient waits to be divided by; None while the window is empty."""
        return self.ledger[0].denominator if self.ledger else None

    def admit(self, name: str, denominator: str) -> None:
        """Check that a gradient with this denominator can join.

        Raises:
            MixedDenominatorsError: another denominator has been deferred already.
        """
        if self.denominator not in (None, denominator):
            raise MixedDenominatorsError(
                f"{name} is divided by {_words(denominator)}, but the window already holds gradients to be divided by "
                f"{_words(self.denominator)} (from {self.ledger[0].loss}): one division cannot serve both; "
                "call optim_step first, or give counts={...} with the totals of the whole step to both calls"
            )

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Let one operation write into fresh gradients, and add them only if it succeeds."""
        before = {name: p.grad for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.grad = None
        try:
            yield
        except BaseException:
            for name, p in self.parameters.items():
                p.grad = before[name]
            raise
        for name, p in self.parameters.items():
            old = before[name]
            if old is not None:
                p.grad = old if p.grad is None else old.add_(p.grad)

    def require_finite(self, blame: Callable[[], str]) -> None:
        """Check the gradients that are being added, or about to be stepped on.

        Raises:
            NonFiniteError: one is NaN or inf; names the first layer, and the datum that ``blame`` finds.
        """
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not found or bool(torch.isfinite(torch.nn.utils.get_total_norm(found.values(), math.inf))):
            return
        for name, gradient in found.items():
            if not bool(torch.isfinite(gradient).all()):
                raise NonFiniteError(
                    f"the gradient of {name} is not finite; first caused by {blame()}; nothing has changed"
                )

    def record(self, entry: LedgerEntry, fitting: str | None) -> None:
        """Note an operation whose gradient has been added."""
        self.ledger.append(entry)
        self.fitting.append(fitting)

    def require_unspoiled(self) -> None:
        """Raise if a gradient operation failed and its error was not read."""
        if self.failures:
            cause = self.failures[0]
            raise PrecedingOperationFailed(
                f"an earlier gradient operation failed ({type(cause).__name__}: {cause}) and its error has not been read, "
                "so this window lacks a batch; read that operation's .result(), or call discard_gradients()"
            ) from cause

    def divisor(self, mode: NormalizationMode) -> Divisor:
        """Return what the gradient must be divided by.

        Raises:
            DoubleNormalizationError: a normalising mode on top of a mean loss.
            ConfigError: the mode is unknown, or ``auto`` cannot be answered.
        """
        if mode == "auto":
            mode = self._auto()
        if mode is None:
            return self._deferred()
        if mode not in ("num_loss_tokens", "num_sequences"):
            raise ConfigError(
                f"grad_accumulation_normalization must be None, 'auto', 'num_loss_tokens' or 'num_sequences', got {mode!r}"
            )
        means = [e.loss for e, fitting in zip(self.ledger, self.fitting, strict=True) if fitting is None]
        if means:
            raise DoubleNormalizationError(
                f"{means[0]} is already a mean; {mode!r} would divide a second time; leave "
                "grad_accumulation_normalization unset, or give the loss aggregation='sum'"
            )
        count = self.tokens if mode == "num_loss_tokens" else self.sequences
        return Divisor(float(count), f"{mode} over {_calls(self.ledger)}")

    def clear(self) -> None:
        """Forget everything."""
        for p in self.parameters.values():
            p.grad = None
        self.ledger, self.fitting, self.failures = [], [], []

    def _deferred(self) -> Divisor:
        if self.denominator in (None, "none"):
            return Divisor(1.0, "nothing")
        total = sum(entry.count for entry in self.ledger)
        return Divisor(total, f"{self.denominator} over {_calls(self.ledger)}")

    def _auto(self) -> NormalizationMode:
        modes = set(self.fitting)
        if "function" in modes:
            raise ConfigError(
                "'auto' needs registered losses: a function does not say whether it returns a sum or a mean; "
                "name the mode, or None"
            )
        if len(modes) > 1:
            raise ConfigError(
                f"'auto' found losses of different normalisations in one window: {sorted(map(str, modes))}"
            )
        found = modes.pop() if modes else None
        return found  # type: ignore[return-value]  # `function` was refused above

    def to_json(self) -> dict[str, Any]:
        """Everything but the gradients, for a checkpoint."""
        return {"ledger": [asdict(entry) for entry in self.ledger], "fitting": list(self.fitting)}

    def restore(self, saved: Mapping[str, Any], gradients: Mapping[str, Tensor]) -> None:
        """Take over a saved window."""
        self.clear()
        self.ledger = [LedgerEntry(**entry) for entry in saved["ledger"]]
        self.fitting = list(saved["fitting"])
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient.to(self.parameters[name].device)


def _calls(ledger: list[LedgerEntry]) -> str:
    return f"{len(ledger)} call{'s' if len(ledger) != 1 else ''}"


def _words(denominator: str | None) -> str:
    return "nothing" if denominator in (None, "none") else f"the number of {denominator}"
