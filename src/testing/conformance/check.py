"""A check of the suite, what it measures, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn, final

from ...errors import RemoteError, UnsupportedError
from ..under_test import BackendUnderTest, Mismatch

__all__ = ["Broken", "Check", "CheckResult", "Evidence", "NotApplicable", "Verdict", "check", "refused", "require"]

Verdict = Literal["passed", "failed", "not supported", "not applicable"]
Measured = float | int | str


@final
class Broken(AssertionError):
    """A promise is broken.

    Attributes:
        cause: what most likely breaks it; empty where only the check's general causes are known.
    """

    def __init__(self, sentence: str, cause: str = "") -> None:
        super().__init__(sentence)
        self.cause = cause


@final
class NotApplicable(Exception):
    """The question does not arise for this backend; the message says why."""


@final
class Evidence:
    """The numbers that a check measures, by name.

    Attributes:
        numbers: what has been noted so far; a failed check has them too.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, Measured] = {}

    def note(self, **numbers: Measured) -> None:
        """Add numbers by name; underscores read as spaces."""
        self.numbers |= {name.replace("_", " "): value for name, value in numbers.items()}


@final
@dataclass(frozen=True)
class CheckResult:
    """What became of one check.

    Attributes:
        check: its name.
        verdict: ``passed``; ``failed``; ``not supported``: the backend says that it lacks this; ``not applicable``: the
            question does not arise here.
        sentence: what was found, or why there is no verdict; empty where all was as promised.
        evidence: what was measured, by name.
        cause: of a failed check: what most likely breaks it.
        seconds: that it took.
    """

    check: str
    verdict: Verdict
    sentence: str = ""
    evidence: Mapping[str, Measured] = field(default_factory=dict)
    cause: str = ""
    seconds: float = 0.0


@final
@dataclass(frozen=True)
class Check:
    """Something that every backend must do, asked by its verbs alone.

    Called with a backend under test, it raises AssertionError where the promise is broken, and returns otherwise.

    Attributes:
        name: what it is asked for by.
        promise: one sentence.
        cause: what usually breaks it.
        work: asks, notes what it measures, and raises `Broken`, `NotApplicable` or ``UnsupportedError``.
    """

    name: str
    promise: str
    cause: str
    work: Callable[[BackendUnderTest, Evidence], None]

    def __call__(self, under_test: BackendUnderTest) -> None:
        try:
            self.work(under_test, Evidence())
        except (NotApplicable, UnsupportedError):
            return


def check(cause: str) -> Callable[[Callable[[BackendUnderTest, Evidence], None]], Check]:
    """Return a decorator that makes a `Check` of a function; its docstring is the promise."""

    def decorate(work: Callable[[BackendUnderTest, Evidence], None]) -> Check:
        promise = " ".join((work.__doc__ or "").split())
        return Check(work.__name__, promise, cause, work)

    return decorate


def require(condition: object, sentence: str, cause: str = "") -> None:
    """Check a condition.

    Raises:
        Broken: it does not hold.
    """
    if not condition:
        raise Broken(sentence, cause)


def refused(error: Exception, what: str) -> NoReturn:
    """Raise the right thing for an optional ability that a backend has refused: that it is not supported.

    Raises:
        UnsupportedError: the refusal was in words.
        Exception: the error itself, where it is no refusal.
    """
    if isinstance(error, RemoteError) and error.category == "user":
        raise UnsupportedError(f"{what}: {error}") from error
    raise error


def broken_by(error: AssertionError) -> str:
    """Return the cause that an error names, if it names one."""
    return error.cause if isinstance(error, (Broken, Mismatch)) else ""
