"""Every planted defect of a backend is found by the check that it belongs to, and the backend without it passes them all."""

from __future__ import annotations

import json

import pytest

from pullback.testing import PROMISES, backend_report
from pullback.testing.conformance import run_check
from pullback.testing.museum.backends import BACKENDS, BackendExhibit
from pullback.testing.museum.relay import Relay


@pytest.mark.parametrize("exhibit", BACKENDS, ids=lambda exhibit: exhibit.name)
def test_a_defect_is_found_by_its_check(exhibit: BackendExhibit) -> None:
    """By its verdict, not by an error: the suite measures what is wrong, and says what usually causes it."""
    result = run_check(PROMISES[exhibit.found_by], exhibit.broken.under_test())
    assert result.verdict == "failed", exhibit.harm
    assert PROMISES[exhibit.found_by].cause in result.cause
    assert "Error:" not in result.sentence.split(" instead of ")[0]


def test_a_backend_without_a_defect_passes() -> None:
    """Negative control: the backend that the defects are planted in keeps every promise, those of a network too."""
    report = backend_report(Relay.under_test(), PROMISES.values())
    assert not report.failed
    assert report["retries_apply_once"].verdict == "passed"
    assert report["seeds_decide_the_start"].verdict == "passed"


def test_every_check_can_fail() -> None:
    """Every check has a planted defect, but for the one that measures and has no bound."""
    without = set(PROMISES) - {exhibit.found_by for exhibit in BACKENDS}
    assert without == {"precision_is_measured"}
    assert len({exhibit.name for exhibit in BACKENDS}) == len(BACKENDS) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("exhibit", BACKENDS, ids=lambda exhibit: exhibit.name)
def test_a_defect_in_the_whole_suite(exhibit: BackendExhibit) -> None:
    """The whole suite ends on a broken backend, and reports the defect by name in both forms."""
    report = backend_report(exhibit.broken.under_test(), PROMISES.values())
    assert exhibit.found_by in [result.check for result in report.failed]
    assert f"## `{exhibit.found_by}` failed" in report.as_markdown()
    rows = {row["check"]: row for row in json.loads(json.dumps(report.as_json()))["checks"]}
    assert rows[exhibit.found_by]["verdict"] == "failed"
    assert not report.as_json()["conforms"]
