"""Running checks: one, or all of them into a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from ...errors import PullbackError, UnsupportedError
from ..under_test import BackendUnderTest
from .check import Check, CheckResult, Evidence, NotApplicable, Verdict, broken_by
from .report import BackendReport

__all__ = ["backend_report", "run_check"]


def run_check(check: Check, under_test: BackendUnderTest) -> CheckResult:
    """Run one check; whatever a broken backend raises becomes a result."""
    evidence, began = Evidence(), time.monotonic()

    def ended(verdict: Verdict, sentence: str = "", cause: str = "") -> CheckResult:
        return CheckResult(check.name, verdict, sentence, evidence.numbers, cause, time.monotonic() - began)

    try:
        check.work(under_test, evidence)
    except NotApplicable as reason:
        return ended("not applicable", str(reason))
    except UnsupportedError as error:
        return ended("not supported", str(error))
    except AssertionError as error:
        pattern = broken_by(error)
        return ended("failed", str(error), f"{pattern}; usually: {check.cause}" if pattern else check.cause)
    except PullbackError as error:
        return ended("failed", f"{type(error).__name__}: {error}", f"a call that must succeed fails; or {check.cause}")
    except Exception as error:  # a broken backend may raise anything
        return ended("failed", f"{type(error).__name__}: {error}", "an error that is none of the protocol's")
    return ended("passed")


def backend_report(
    under_test: BackendUnderTest,
    checks: Iterable[Check],
    told: Callable[[CheckResult], object] = lambda result: None,
) -> BackendReport:
    """Run checks and report.

    Args:
        under_test: the backend.
        checks: in this order.
        told: is told of each result as it comes.
    """
    chosen, results = tuple(checks), []
    for check in chosen:
        results.append(run_check(check, under_test))
        told(results[-1])
    return BackendReport(under_test.name, dict(under_test.facts), chosen, tuple(results))
