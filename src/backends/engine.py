"""What a backend must be able to do: the verbs, their checks and their order are `Backend`'s, the work is an engine's."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias, final

from torch import Tensor, nn

from ..datums.types import ModelInput
from ..errors import MissingReferenceError, UnsupportedError
from .calls.prepared import PreparedCall
from .operations.futures import Answer
from .operations.normalization import Divisor, Ledger
from .protocol import NormalizationMode
from .types import AdamParams, ForwardBackwardOutput, Plan, Rollout, SamplingParams

__all__ = ["Call", "Engine", "EngineLimits", "Gradient", "Scorer"]

Scorer: TypeAlias = Callable[[PreparedCall], Answer[Sequence[Tensor]]]


@final
@dataclass(frozen=True)
class Call:
    """One operation that was asked of a backend: its verb, its loss or checkpoint, and how many datums it had."""

    operation: str
    name: str = ""
    datums: int = 0


@final
@dataclass(frozen=True)
class EngineLimits:
    """What may be asked of an engine.

    Args:
        vocab_size: token ids are below it; None = not known.
        max_length: longest model input, tokens; None = no limit.
        skips_positions: it can leave out the positions of weight 0.
        discards: it can forget what has been accumulated.
        tempers: it scores a datum at the temperature that the datum names.
    """

    vocab_size: int | None = None
    max_length: int | None = None
    skips_positions: bool = False
    discards: bool = True
    tempers: bool = False


@final
@dataclass(frozen=True, eq=False)
class Gradient:
    """What one call has added to the accumulation.

    Attributes:
        output: the call's result.
        tokens, sequences: with a non-zero cotangent.
        denominator, count: what the gradient waits to be divided by (``none``: nothing).
        cotangents: dL/dlogprob of each datum, not divided by ``count`` yet; None where another computed them.
    """

    output: Answer[ForwardBackwardOutput]
    tokens: int
    sequences: int
    denominator: str
    count: float
    cotangents: Mapping[int, Tensor] | None = None


class Engine(abc.ABC):
    """Scores, accumulates gradients, steps, clears, saves and loads. Its methods raise, and return plain answers.

    The six abstract methods are all that a backend needs. The others have a meaning that fits an engine that works in the
    caller's thread.

    Attributes:
        limits: what may be asked of it.
        weights_version: optimizer steps so far.
        trained: the weights that are trained, by name, as far as they lie here.
    """

    limits: EngineLimits = EngineLimits()
    weights_version: int = 0
    trained: Mapping[str, nn.Parameter] = MappingProxyType({})

    @abc.abstractmethod
    def score(self, call: PreparedCall) -> Answer[Sequence[Tensor]]:
        """Return the log-probs of every target token, one tensor per datum; no gradient."""

    @abc.abstractmethod
    def accumulate(self, call: PreparedCall) -> Gradient:
        """Add the gradient of the call's loss, all of it or nothing."""

    @abc.abstractmethod
    def step(self, params: AdamParams, divisor: Divisor) -> Answer[Mapping[str, float] | None]:
        """Divide what has been accumulated, make one AdamW step, forget the gradients; return metrics.

        None: elsewhere, nothing had been accumulated, and no step was made.
        """

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget what has been accumulated."""

    @abc.abstractmethod
    def save(self, name: str, overwrite: bool, ledger: Ledger) -> Answer[str]:
        """Write everything that the next step depends on; return the path."""

    @abc.abstractmethod
    def load(self, path: str, everything: bool) -> Ledger:
        """Load the weights, or everything; return the ledger of the gradients that came with it."""

    @contextmanager
    def operation(self, call: Call) -> Iterator[None]:
        """Surround an operation, which fails if this raises."""
        self.begin(call)
        yield

    def begin(self, call: Call) -> None:
        """Called before every operation, which fails if this raises."""
        return

    def deferred_denominator(self, call: PreparedCall) -> str:
        """What the gradient of this call will wait to be divided by; checked before any work."""
        return call.denominator

    def divisor(self, ledger: Ledger, mode: NormalizationMode) -> Divisor:
        """What the accumulation is divided by, and where."""
        return ledger.divisor(mode)

    def holds_nothing(self, ledger: Ledger, divisor: Divisor) -> bool:
        """Whether what has been accumulated is known to be no gradient, so that there is no step to make."""
        return ledger.tokens == 0 or divisor.value == 0

    def gradients(self) -> Mapping[str, Tensor]:
        """Return what has been accumulated, not divided, by parameter name."""
        raise UnsupportedError("this backend's gradients lie elsewhere and cannot be read")

    def plan(self, call: PreparedCall) -> Plan:
        """Say what `accumulate` would do."""
        tokens = sum(len(datum.model_input) for datum in call.data)
        if call.registered is None:
            return Plan("single_pass", "a function sees all log-probs of its call", tokens=tokens, scored=tokens)
        return Plan("native", f"{call.name} by name", tokens=tokens, scored=tokens)

    def reference(self) -> Scorer:
        """Return what scores with the frozen reference.

        Raises:
            MissingReferenceError: there is none.
        """
        raise MissingReferenceError("this backend has no reference model")

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> Answer[list[Rollout]]:
        """Draw ``n`` completions of each prompt, prompt-major."""
        raise UnsupportedError("this backend cannot sample")

    def snapshot(self, weights: bool) -> Callable[[], None]:
        """Set the accumulated gradients aside and return what brings everything back as it is now.

        Args:
            weights: steps may be made before; weights, optimizer and the number of steps come back too.

        Raises:
            UnsupportedError: the state lies elsewhere.
        """
        raise UnsupportedError("this backend's state lies elsewhere, so that what is done to it cannot be undone")

    def close(self, timeout: float | None = None) -> None:
        """Give back what is held, within ``timeout`` seconds if others must help (None = as long as it takes)."""
        self.clear()
