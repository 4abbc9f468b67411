"""The table of a datum, and its colors."""

from __future__ import annotations

import re
import sys

import pytest

from pullback.datums import Datum, ModelInput, datum_from_rollout, datum_from_tokens_weights, explain

DATUM = datum_from_rollout([7, 8], [9, 3], [-0.5, -1.0], [2.0, -2.0])
GREEN, RED, FAINT = "\x1b[32m", "\x1b[31m", "\x1b[2m"


def plain(text: str) -> str:
    return re.sub(r"\x1b\[\d*m", "", text)


def test_colors_say_what_is_trained() -> None:
    """Trained targets are green, red where there is to be less of them, and the rest is faint; the text stays the same."""
    colored, black = explain(DATUM, color=True), explain(DATUM, color=False)
    assert plain(colored) == black
    header, prompt, more, less = colored.splitlines()
    assert plain(header) == header
    assert prompt.startswith(FAINT)
    assert (GREEN + "9" in more, RED + "3" in less) == (True, True)
    assert GREEN not in prompt + less
    assert RED not in prompt + more
    unweighted = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})
    assert explain(unweighted, color=True).count(GREEN) == 2
    wide = Datum(ModelInput.from_ints([1]), {"target_tokens": [[2, 3]], "weights": [[0.0, 1.0]]})
    assert GREEN in explain(wide, color=True)


@pytest.mark.parametrize(
    ("terminal", "environment", "colored"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": ""}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_color_is_for_terminals(
    terminal: bool, environment: dict[str, str], colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word, color is for a terminal that is not asked to do without."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert (GREEN in datum_from_tokens_weights([1, 2], [0, 1]).explain()) == colored


def test_weights_that_are_not_given() -> None:
    """Where a datum has no weights, the table says which one its targets have."""
    inputs = {"target_tokens": [2, 3], "advantages": [0.5, -1.0]}
    datum = Datum(ModelInput.from_ints([1, 2]), inputs)
    cells = [[cell.strip() for cell in line.split("|")] for line in explain(datum, color=False).splitlines()]
    assert cells[0] == ["position", "token", "target", "weight", "advantage"]
    assert cells[2] == ["1", "2", "3", "1 (default)", "-1"]
    assert plain(explain(datum, color=True)) == explain(datum, color=False)
    assert "default" not in explain(datum.with_inputs(weights=[1.0, 1.0]))
    own = explain(Datum(ModelInput.from_ints([1, 2]), {})).splitlines()
    assert [cell.strip() for cell in own[1].split("|")] == ["0", "1", "2", "1 (default)"]
