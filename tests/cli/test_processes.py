"""The commands under torchrun: every promise holds on two processes, the demo's curves are those of one, one process speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import command_ranks
from many_ranks.ranks import run_ranks

from pullback.testing import PROMISES

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"
)
SCRIPT = Path(command_ranks.__file__)
FEW = ("every_token_counts", "checkpoints_hold_everything")


def checked(*names: str) -> list[str]:
    """Run checks of the native backend on two processes; return the lines of the first one."""
    only = [word for name in names for word in ("--only", name)]
    first, second = run_ranks(SCRIPT, "check", "backend", *only, seconds=600)
    assert second == ""
    return first.splitlines()


@pytest.mark.slow
def test_a_single_datum_and_checkpoints_on_two_processes() -> None:
    """A call that is too small for two shares, and one folder for both."""
    lines = checked(*FEW)
    assert [line.split()[:2] for line in lines[:-1]] == [[name, "passed"] for name in FEW]


@pytest.mark.slow
def test_every_promise_of_a_backend_on_two_processes() -> None:
    lines = [line for line in checked() if line.split()[0] in PROMISES]
    verdicts = {line.split()[0]: line.split()[1] for line in lines}
    assert verdicts == dict.fromkeys(PROMISES, "passed") | {"retries_apply_once": "not"}  # applicable: no network


@pytest.mark.soak
def test_the_demo_on_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """Every figure of SFT, DPO and ORPO to 1e-3 in fp32; GRPO learns from samples, which a rounding can change."""
    pytest.importorskip("rich", reason="the demo shows its progress with rich (extra cli)")
    pytest.importorskip("matplotlib", reason="the demo draws with matplotlib (extra plot)")
    pytest.importorskip("peft", reason="the demo trains an adapter (extra hf)")
    found: dict[int, Any] = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        _, *others = run_ranks(SCRIPT, "demo", "--model", "tiny", "--out", str(folder), ranks=ranks, seconds=600)
        assert others == [""] * (ranks - 1)
        found[ranks] = json.loads((folder / "results.json").read_text())["objectives"]
    for one, two in zip(found[1], found[2], strict=True):
        assert two["improved"]
        assert two["steps"] == one["steps"], one["name"]
        if one["name"] != "grpo":
            assert two["training"] == pytest.approx(one["training"], rel=1e-3, abs=1e-3), one["name"]
            for ours, theirs in zip(two["points"], one["points"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3), one["name"]
