"""Which test runs in which tier."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import TIERS, reason_to_skip

SUPPORT = Path(__file__).parent / "support"


@pytest.mark.parametrize(
    ("marker", "skipped"), [("slow", ["quick"]), ("soak", ["quick", "all"]), ("smollm2", [])], ids=lambda x: str(x)
)
def test_markers_wait_for_their_tier(marker: str, skipped: list[str]) -> None:
    """A marked test is left out of shorter tiers, with the command that runs it; other markers leave nothing out."""
    reasons = {tier: reason_to_skip(marker, tier) for tier in TIERS}
    assert [tier for tier, reason in reasons.items() if reason is not None] == skipped
    assert all("make " in reason for reason in reasons.values() if reason is not None)


def test_an_unknown_tier_is_refused() -> None:
    """A misspelled tier does not pass as a shorter one."""
    environment = {**os.environ, "PULLBACK_TIER": "everything", "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run([sys.executable, "-c", "import tiers"], env=environment, capture_output=True, text=True)
    assert "known tiers are quick, all, soak" in done.stderr
