"""The pytest plugin: the fixture `pullback_check`, and how many examples a property gets.

Imported by every run of pytest where pullback is installed, so it imports neither torch nor hypothesis by itself.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

__all__ = ["pullback_check", "pytest_addoption"]

_EXAMPLES: Final = {"fast": 6, "default": 20, "thorough": 200}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--pullback-profile``."""
    parser.getgroup("pullback").addoption(
        "--pullback-profile",
        choices=tuple(_EXAMPLES),
        default="default",
        help="how many random batches each property of a loss is checked on: "
        + ", ".join(f"{k} {n}" for k, n in _EXAMPLES.items()),
    )


@pytest.fixture(scope="session")
def pullback_check(request: pytest.FixtureRequest) -> Any:
    """`pullback.testing.check_loss` with the examples of the profile: ``pullback_check(my_loss, form="padded")``."""
    from pullback.testing.losscheck.suite import Checker

    return Checker(_EXAMPLES[request.config.getoption("--pullback-profile")])
