"""Futures: a result or an error that somebody must retrieve."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, final

__all__ = ["Answer", "Failure", "FinishedFuture", "Future", "Outcome", "Pending", "State", "then"]

State: TypeAlias = Literal["pending", "accepted", "failed", "unknown"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")
_logger = logging.getLogger(__name__)


class Future(Protocol[T_co]):
    """The handle that every operation returns."""

    def result(self, timeout: float | None = None) -> T_co:
        """Return the result, or raise the operation's error."""
        ...

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the operation's error, or None. Counts as retrieving it."""
        ...

    def done(self) -> bool:
        """True if the operation has ended."""
        ...

    def __await__(self) -> Generator[Any, None, T_co]: ...


class Outcome(Protocol):
    """How an operation ended, as its backend remembers it.

    Attributes:
        retrieved: somebody has asked for the result or the error.
        deadline: seconds that `settle` should wait; None = for ever.
    """

    retrieved: bool
    deadline: float | None

    def settle(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error, without counting as retrieving it."""
        ...

    @property
    def state(self) -> State:
        """What has been learned of it: ``failed`` if it has had no effect, ``unknown`` if nobody can say whether it has."""
        ...


@final
@dataclass(eq=False)
class Failure:
    """An operation that has failed, and whether its error has been retrieved."""

    error: BaseException
    retrieved: bool = False
    deadline: float | None = None

    def settle(self, timeout: float | None = None) -> BaseException:
        """Return the error."""
        return self.error

    @property
    def state(self) -> State:
        """What fails here adds nothing."""
        return "failed"


class Pending(abc.ABC, Generic[T]):
    """What an engine returns for an operation that runs elsewhere: the answer is under way."""

    @abc.abstractmethod
    def map(self, convert: Callable[[T], U]) -> Pending[U]:
        """Return the same answer, converted once it is here."""

    @abc.abstractmethod
    def future(self, operation: str) -> Any:
        """Return its future, which is an `Outcome` too.

        Args:
            operation: for messages.
        """


Answer: TypeAlias = T | Pending[T]


def then(answer: Answer[T], convert: Callable[[T], U]) -> Answer[U]:
    """Convert an answer, now or once it is here."""
    return answer.map(convert) if isinstance(answer, Pending) else convert(answer)


@final
class FinishedFuture(Generic[T]):
    """The future of an operation that has already run, in the caller's thread.

    An error that is never retrieved is logged when the future dies.
    """

    def __init__(self, value: T | None = None, failure: Failure | None = None, operation: str = "operation") -> None:
        self._value = value
        self._failure = failure
        self._operation = operation

    def result(self, timeout: float | None = None) -> T:
        """Return the result, or raise the operation's error (``timeout`` is never needed)."""
        error = self.exception()
        if error is not None:
            raise error
        return self._value  # type: ignore[return-value]  # None is the value of operations that return nothing

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the operation's error, or None. Counts as retrieving it."""
        if self._failure is None:
            return None
        self._failure.retrieved = True
        return self._failure.error

    def done(self) -> bool:
        """Always True."""
        return True

    def __await__(self) -> Generator[Any, None, T]:
        return self.result()
        yield  # a function with a yield is a generator, which is what `await` wants

    def __del__(self) -> None:
        if self._failure is not None and not self._failure.retrieved:
            _logger.error("%s failed and nobody retrieved its error: %s", self._operation, self._failure.error)
