"""What is said of other projects' losses is what is found, wherever they are installed; the page is what was recorded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peer_losses.judged import Judgement, judgement
from benchmarks.peer_losses.page import page, unjudged
from benchmarks.peer_losses.report import SETTINGS, WRAPPED, changes, checked
from benchmarks.peer_losses.wrapped import PEERS, Setting, Wrapped

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "benchmarks" / "peer_losses" / "found.json"
PAGE = ROOT / "docs" / "peer-losses.md"
pytestmark = pytest.mark.skipif(not FOUND.exists(), reason="needs the source tree")


def found() -> dict[str, Any]:
    """What was recorded."""
    recorded: dict[str, Any] = json.loads(FOUND.read_text())
    return recorded


def test_the_page_is_what_was_found() -> None:
    """The page is made of what was recorded, of every function that is wrapped, each failure of which was looked at."""
    recorded = found()
    assert PAGE.read_text() == page(recorded)
    assert [(f["peer"], f["name"]) for f in recorded["functions"]] == [(w.peer, w.name) for w in WRAPPED]
    assert unjudged(recorded) == []


def test_a_failure_that_nobody_looked_at_is_noticed() -> None:
    """Neither a new failure nor another verdict fits the page."""
    other = copy.deepcopy(found())
    other["functions"][0]["failed"]["deterministic"] = "called twice, ..."
    assert unjudged(other) == [(WRAPPED[0].peer, WRAPPED[0].name, "deterministic")]
    other["functions"][0]["failed"] = {}
    assert page(other) != page(found())


def test_defects_are_reproduced() -> None:
    """More than eight defects are, each of them by a property that fails, or a setting without effect."""
    recorded = found()
    defects: set[Judgement] = set()
    for function in recorded["functions"]:
        judged = (judgement(function["peer"], function["name"], name) for name in function["failed"])
        defects |= {each for each in judged if each is not None and each.mark == "defect"}
    assert len(defects) >= 8
    assert {s["peer"] for s in recorded["settings"] if not s["effect"]} >= {"TRL", "Liger"}


def skip_unless_recorded(peer: str) -> None:
    """Skip where a project is not installed, or in another version than the one that the page is about."""
    installed, recorded = PEERS[peer].version, found()["versions"][peer]
    if installed is None:
        pytest.skip(f"needs {PEERS[peer].distribution}: pip install it, see docs/peer-losses.md")
    if installed != recorded:
        pytest.skip(f"the page is about {peer} {recorded}, {installed} is installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", WRAPPED, ids=lambda w: f"{w.peer}: {w.name}")
def test_found_again(wrapped: Wrapped) -> None:
    """A function fails what it is said to fail, and passes the rest; its KL is on average what it is said to be."""
    skip_unless_recorded(wrapped.peer)
    recorded = next(f for f in found()["functions"] if (f["peer"], f["name"]) == (wrapped.peer, wrapped.name))
    again = checked(wrapped)
    assert list(again["failed"]) == list(recorded["failed"])
    assert again["kind"] == recorded["kind"]
    assert again.get("on_average", {}).get("verdict") == recorded.get("on_average", {}).get("verdict")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.peer}: {s.name}, {s.words}")
def test_settings(setting: Setting) -> None:
    """A setting changes the loss, or does not, as it is said to."""
    skip_unless_recorded(setting.peer)
    key = (setting.peer, setting.name, setting.words)
    recorded = {(s["peer"], s["name"], s["setting"]): s["effect"] for s in found()["settings"]}
    assert changes(setting) == recorded[key]
