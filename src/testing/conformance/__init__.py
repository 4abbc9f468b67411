"""What every backend promises, as checks that use nothing but its verbs. Run them on your own backend, or on a service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..under_test import BackendUnderTest
from .check import Check, CheckResult
from .checks.accumulation import ACCUMULATION
from .checks.failures import FAILURES
from .checks.gradients import GRADIENTS
from .checks.optimizer import OPTIMIZER
from .checks.precision import PRECISION
from .checks.scoring import SCORING
from .checks.state import STATE
from .report import BackendReport
from .run import backend_report, run_check

__all__ = [
    "PROMISES",
    "THEMES",
    "BackendReport",
    "Check",
    "CheckResult",
    "backend_report",
    "check_backend",
    "run_check",
]

THEMES: Final[Mapping[str, tuple[Check, ...]]] = {
    "Log-probs and losses": SCORING,
    "Gradients": GRADIENTS,
    "Accumulation": ACCUMULATION,
    "The step": OPTIMIZER,
    "Failures": FAILURES,
    "State and samples": STATE,
    "Precision": PRECISION,
}
PROMISES: Final[Mapping[str, Check]] = {check.name: check for checks in THEMES.values() for check in checks}


def check_backend(under_test: BackendUnderTest) -> dict[str, str]:
    """Check every promise; return what is wrong by promise, an empty dict if nothing is.

    Each entry of `PROMISES` can also be run alone, for instance in a parametrized test; it raises AssertionError.
    """
    return {result.check: result.sentence for result in backend_report(under_test, PROMISES.values()).failed}
