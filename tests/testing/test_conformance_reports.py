"""Reports that a maintainer can use, pages that say what the code does, and services whose new models differ."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pullback.backends import FakeBackend
from pullback.cli import main
from pullback.errors import RemoteError, UnsupportedError
from pullback.testing import PROMISES, BackendUnderTest, backend_report
from pullback.testing.conformance import run_check
from pullback.testing.conformance.check import refused
from pullback.testing.conformance.page import checks_table, defects_table, precision_table, results_table
from pullback.testing.conformance.services import comparable
from pullback.testing.museum.backends import BACKENDS
from pullback.testing.museum.backends.relay import Relay
from pullback.testing.museum.backends.requests import CustomDoubled, SignLost

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
FEW = [PROMISES[name] for name in ("scores_are_aligned", "gradients_match_the_loss", "retries_apply_once")]


def test_a_failure_in_a_report() -> None:
    """It says what was promised, found and measured, the likely cause, and how to see it again."""
    report = backend_report(BackendUnderTest(SignLost, name="sign lost", facts={"version": "1.0"}), FEW)
    assert [result.verdict for result in report.results] == ["passed", "failed", "not applicable"]
    assert report["gradients_match_the_loss"] in report.failed
    text = report.as_markdown()
    for part in ("# Conformance of sign lost", "- version: 1.0", "- **promised:** A step along", "the sign is lost"):
        assert part in text
    assert "- `retries_apply_once`: not applicable: there is no network" in text
    assert str(report).endswith("1 passed, 1 failed, 1 not applicable")
    with pytest.raises(KeyError):
        report["no_such_check"]


def test_a_passing_report_has_no_failures() -> None:
    """Negative control."""
    report = backend_report(BackendUnderTest(FakeBackend), FEW)
    assert not report.failed
    assert "failed" not in report.as_markdown()
    assert report.as_json()["conforms"]


def test_a_factor_is_named() -> None:
    """Where an update is a multiple of what it should be, the cause says which count that is."""
    under_test = BackendUnderTest(CustomDoubled)
    assert "applied twice" in run_check(PROMISES["functions_match_registered_losses"], under_test).cause
    words = {21.0: "number of trained tokens", 1 / 27: "number of all tokens", 1 / 6: "sequences", 3.0: "pairs"}
    for factor, expected in words.items():
        assert expected in under_test.factor_in_words(factor)
    assert under_test.factor_in_words(1.7) == ""


def test_the_command_in_a_report_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line that shows a failure again is a command that can be run as it stands, and holds no key."""
    file = tmp_path / "report.md"
    command = ["check", "backend", "--kind", "fake", "--only", "scores_are_aligned", "--api-key", "tml-secret"]
    assert main([*command, "--markdown", str(file)]) == 0
    assert "tml-secret" not in file.read_text()
    (line,) = [line for line in file.read_text().splitlines() if line.startswith("- command: ")]
    words = shlex.split(line.removeprefix("- command: "))
    assert words[0] == "pullback"
    capsys.readouterr()
    assert main([*words[1:], "--only", "scores_are_aligned"]) == 0
    assert "1 passed" in capsys.readouterr().out


def test_a_service_needs_the_name_of_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "backend", "--url", "http://127.0.0.1:9"]) == 2
    assert "--base-model" in capsys.readouterr().err


def test_nobody_at_the_address_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """And not by every check."""
    assert main(["check", "backend", "--url", "http://127.0.0.1:9", "--base-model", "tiny"]) == 2
    printed = capsys.readouterr()
    assert "no service answers at http://127.0.0.1:9" in printed.err
    assert printed.out == ""


class Forgetful(Relay):
    """New models begin anywhere; checkpoints are the service's, not the model's."""

    seeds: ClassVar[Any] = itertools.count()
    checkpoints: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__(next(self.seeds))
        self.engine.saved = self.checkpoints


class Hopeless(Forgetful):
    """Nor do its checkpoints load."""

    checkpoints: ClassVar[dict[str, Any]] = {}  # its own: the name under which both save is free in any order of tests

    def load_state_with_optimizer(self, path: str) -> Any:
        raise UnsupportedError("no checkpoints")


def test_models_that_begin_alike_by_a_checkpoint() -> None:
    """Where the seed decides nothing, all fresh models load one checkpoint; only seeds fail then."""
    found = comparable(BackendUnderTest(Forgetful, seeded=lambda seed: Forgetful()))
    assert "by a checkpoint" in found.facts["new models begin alike"]
    assert run_check(PROMISES["raw_sums_add_up"], found).verdict == "passed"
    assert run_check(PROMISES["seeds_determine_initial_weights"], found).verdict == "failed"
    assert comparable(BackendUnderTest(FakeBackend)).facts["new models begin alike"] == "by their seed"


def test_updates_that_cannot_be_compared() -> None:
    """Without either, no verdict on updates is given; what needs no second model is still checked."""
    found = comparable(BackendUnderTest(Hopeless))
    result = run_check(PROMISES["raw_sums_add_up"], found)
    assert result.verdict == "not supported"
    assert "a checkpoint does not load" in result.sentence
    assert run_check(PROMISES["gradients_match_the_loss"], found).verdict == "passed"


def test_a_refusal_of_an_option_is_no_failure() -> None:
    """What a service refuses as the caller's fault is not supported; what it cannot do without saying so is an error."""
    with pytest.raises(UnsupportedError, match=r"\[T, K\]"):
        refused(RemoteError("targets must be flat", "user"), "targets of shape [T, K]")
    with pytest.raises(RemoteError):
        refused(RemoteError("it broke", "server"), "targets of shape [T, K]")


def test_results_side_by_side() -> None:
    """Verdicts of several backends in one table, and the precision of one."""
    reports = [
        backend_report(BackendUnderTest(make, name=name), [*FEW, PROMISES["precision_is_measured"]]).as_json()
        for make, name in ((FakeBackend, "right"), (SignLost, "wrong"))
    ]
    table = results_table(reports).splitlines()
    assert table[0] == "| check | right | wrong |"
    assert "| `gradients_match_the_loss` | passed | **failed** |" in table
    assert "alone against together" in precision_table(reports[0])


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_the_page_says_what_the_code_does() -> None:
    """Both tables of the page are made from the code: python -m pullback.testing.conformance.page."""
    page = PAGE.read_text()
    assert checks_table() in page
    assert defects_table(BACKENDS) in page
