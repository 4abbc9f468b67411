"""The defects of backends in the museum: every check has one, and the backend that they are planted in passes all checks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pullback.testing import PROMISES, backend_report
from pullback.testing.museum import Exhibit
from pullback.testing.museum.backends import BACKENDS
from pullback.testing.museum.backends.relay import Relay


@pytest.mark.slow
def test_a_backend_without_a_defect_passes() -> None:
    """Negative control: the backend that the defects are planted in keeps every promise, those of a network too."""
    report = backend_report(Relay.under_test(), PROMISES.values())
    assert not report.failed
    assert report["retries_apply_once"].verdict == "passed"
    assert report["seeds_determine_initial_weights"].verdict == "passed"


def test_every_check_can_fail() -> None:
    """Every check has a planted defect, but for the one that measures and has no bound."""
    without = set(PROMISES) - {exhibit.found_by for exhibit in BACKENDS}
    assert without == {"precision_is_measured"}
    assert len({exhibit.name for exhibit in BACKENDS}) == len(BACKENDS) >= 20


@pytest.mark.soak
@pytest.mark.parametrize("exhibit", BACKENDS, ids=lambda exhibit: exhibit.name)
def test_a_defect_in_the_whole_suite(exhibit: Exhibit) -> None:
    """The whole suite ends on a broken backend, and reports the defect by name in both forms."""
    broken: Any = exhibit.broken
    report = backend_report(broken.under_test(), PROMISES.values())
    assert exhibit.found_by in [result.check for result in report.failed]
    assert f"## `{exhibit.found_by}` failed" in report.as_markdown()
    rows = {row["check"]: row for row in json.loads(json.dumps(report.as_json()))["checks"]}
    assert rows[exhibit.found_by]["verdict"] == "failed"
    assert not report.as_json()["conforms"]
