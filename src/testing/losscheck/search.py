"""The search for a batch that shows that a property does not hold, and for the smallest one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Final, final

import torch

from ...errors import require_extra
from ..cases import Case
from .failures import Failed, NotApplicable
from .forms import LossUnderTest
from .results import Property

__all__ = ["Counterexample", "drawn", "outcome", "search"]

_SHRINKING: Final = 50  # calls after the first failure; the smallest one so far is good enough then
_EMPTY: Final = Case(())
_OF_CALLS: Final = ("deterministic", "stateless", "pure", "metrics")  # whose sentences are about just that


@final
class Counterexample(Exception):
    """A property fails on a case.

    Attributes:
        case: the batch, or None where the property has numbers of its own.
        failure: what was found there.
    """

    def __init__(self, case: Case | None, failure: Failed) -> None:
        super().__init__(str(failure))
        self.case = case
        self.failure = failure


@final
class _StopSearch(BaseException):
    """Ends a search from within; Hypothesis catches no more than an Exception."""


@final
class _Smallest:
    """A check that remembers its smallest failure."""

    def __init__(self, under_test: LossUnderTest, checked: Property, examples: int) -> None:
        self._under_test, self._property = under_test, checked
        self.best: Counterexample | None = None
        self.note: str | None = None
        self._left = _SHRINKING + examples  # the search draws the same examples first

    def __call__(self, case: Case) -> None:
        if self.best is not None:
            self._left -= 1
            if self._left < 0:
                raise _StopSearch
        try:
            note = outcome(self._under_test, self._property, case)
            self.note = min(filter(None, (note, self.note)), key=len, default=None)  # the most definite one
        except Counterexample as found:
            if self.best is None or _size(case) <= _size(self.best.case or case):
                self.best = found
            raise


def outcome(under_test: LossUnderTest, checked: Property, case: Case) -> str | None:
    """Return the note of one check.

    Raises:
        Counterexample: the property fails.
        NotApplicable: it says nothing here.
    """
    try:
        return checked.check(under_test, case)
    except NotApplicable:
        raise
    except Failed as failure:
        found = _not_finite(under_test, case) or _not_the_same(under_test, checked, case) or failure
        raise Counterexample(case if case.sequences else None, found) from failure
    except Exception as error:
        raised = Failed(
            f"it raises {type(error).__name__}: {error}", "an input, a shape or a number that it is not made for"
        )
        raised.__cause__ = error
        raise Counterexample(case if case.sequences else None, raised) from error


def _not_finite(under_test: LossUnderTest, case: Case) -> Failed | None:
    """Return that a loss has no number on a plain batch, if so: whatever is asked of it there says nothing else."""
    if not case.sequences:
        return None
    try:
        measured = under_test.measure(case)
    except Exception:
        return None
    if math.isfinite(measured.value) and bool(measured.flat.isfinite().all()):
        return None
    return Failed(
        f"on a batch of finite numbers the loss is {measured.value:g}, so that nothing else can be asked of it there",
        "0/0, as of the standard deviation of one number, of a count of nothing, or of equal numbers; `few` and "
        "`nothing_trained` say more",
    )


def _not_the_same(under_test: LossUnderTest, checked: Property, case: Case) -> Failed | None:
    """Return that a loss differs from call to call, if so: any comparison of two calls fails by that alone."""
    if not case.sequences or checked.name in _OF_CALLS:
        return None
    try:
        first, second = under_test.measure(case), under_test.measure(case)
    except Exception:
        return None
    if torch.equal(first.flat, second.flat) and first.value == second.value:
        return None
    return Failed(
        f"called twice on one batch, the loss is {first.value:.6g} and {second.value:.6g}, so that nothing else can be asked "
        "of it",
        "a state between the calls, or random numbers; `deterministic` and `stateless` say more",
    )


def search(under_test: LossUnderTest, checked: Property, examples: int, shrink: bool = True) -> str | None:
    """Check a property on that many random cases; return its note.

    Raises:
        Counterexample: the smallest failure that was found; the first one, where it is not shrunk.
        NotApplicable: the property says nothing about this loss.
    """
    if checked.cases == "none":
        return outcome(under_test, checked, _EMPTY)
    unit, on_policy = under_test.unit(), checked.cases == "on_policy"
    check = _Smallest(under_test, checked, examples)
    try:
        for case in drawn(unit, on_policy, examples):
            check(case)
    except Counterexample:
        if shrink:
            _shrink(check, unit, on_policy, examples)
    if check.best is not None:
        raise check.best
    return check.note


@lru_cache(maxsize=32)
def drawn(unit: int, on_policy: bool, examples: int) -> tuple[Case, ...]:
    """Return random cases, the same for every property and loss."""
    cases: list[Case] = []
    _examine(cases.append, unit, on_policy, examples)
    return tuple(cases)


def _shrink(check: _Smallest, unit: int, on_policy: bool, examples: int) -> None:
    """Look for smaller failures than the first one, which the check remembers."""
    try:
        _examine(check, unit, on_policy, examples)
    except (Exception, _StopSearch) as error:
        # Hypothesis calls a loss with state flaky; the failures themselves were remembered.
        if isinstance(error, NotApplicable):
            raise


def _examine(check: Callable[[Case], None], unit: int, on_policy: bool, examples: int) -> None:
    require_extra("hypothesis", "test", "check_loss draws random batches, for which it")
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings

    from ..strategies import readable_cases

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @given(readable_cases(unit=unit, on_policy=on_policy))
    def examine(case: Case) -> None:
        check(case)

    examine()


def _size(case: Case) -> tuple[int, float]:
    tokens = sum(len(s.logprobs) for s in case.sequences)
    spread = math.fsum(abs(x) for s in case.sequences for x in (*s.logprobs, *s.advantages, *s.weights))
    return tokens, spread
