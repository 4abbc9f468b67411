"""Measurements that a user can run: numerics by dtype, agreement of sampler and trainer, the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_data, tiny_backend, tiny_llama

from pullback.backends import Head, SamplingParams, TorchBackend
from pullback.cli import main
from pullback.datums import ModelInput
from pullback.testing import head_numerics, model_numerics, sampling_agreement

PROMPTS = [ModelInput.from_ints(p) for p in ([5, 6, 7], [5], [8, 9, 10, 11, 3])]


def test_numerics_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours is no further from fp64 than the textbook in any dtype; packing changes nothing."""
    assert main(["bench", "numerics", "--model", "tiny", "--tokens", "300"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["what"]: row for row in report["rows"]}
    for dtype, size in (("float32", 2e-6), ("bfloat16", 2e-2), ("float16", 2e-3)):
        ours, plain = rows[f"head, {dtype}, selected_logprobs"], rows[f"head, {dtype}, log_softmax"]
        assert ours["mean"] <= 1.05 * plain["mean"]
        assert 0 < ours["largest"] < size
    assert rows["model, float32 weights, packed"]["largest"] < 2e-6
    assert rows["sampler against forward, float32"]["largest"] < 2e-6


def test_sampling_check(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0 where sampler and trainer agree, 1 beyond the tolerance."""
    assert main(["check", "sampling", "--model", "tiny", "--temperature", "0.7"]) == 0
    assert "mean the same policy" in capsys.readouterr().out
    assert main(["check", "sampling", "--model", "tiny", "--dtype", "bfloat16", "--tolerance", "1e-9"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_agreement_notices_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a trainer with other weights than the sampler's does not agree."""
    backend = TorchBackend(tiny_llama(torch.float32))
    assert sampling_agreement(backend, PROMPTS).largest < 1e-5
    other = TorchBackend(tiny_llama(torch.float32, lora=2))
    monkeypatch.setattr(backend, "forward", other.forward, raising=False)
    agreement = sampling_agreement(backend, PROMPTS, params=SamplingParams(max_tokens=8, seed=0))
    assert agreement.largest > 1e-3
    assert agreement.tokens > 8


def test_numerics_of_hidden_states() -> None:
    """fp64 against itself is exact, and half precision is not."""
    backend: Any = tiny_backend()
    (row,) = model_numerics(backend.model, {"same": backend.model}, make_data([5, 7]))
    assert row.largest == 0.0
    hidden, targets = torch.randn(40, 8, dtype=torch.float64), torch.randint(30, (40,))
    rows = head_numerics(
        hidden, Head(torch.randn(30, 8, dtype=torch.float64)), targets, [torch.float32, torch.bfloat16]
    )
    assert rows[0].largest < 1e-5 < rows[2].largest


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(arguments, marks=pytest.mark.slow, id=arguments[0])
        for arguments in (
            ["head", "--shapes", "small", "--dtypes", "float32"],
            ["custom", "--model", "tiny", "--sequences", "4", "--length", "32", "--token-budget", "64"],
            ["step", "--model", "tiny", "--sequences", "4"],
            ["layouts", "--model", "tiny", "--sequences", "4", "--clock", "cpu", "--threads", "1"],
        )
    ],
)
def test_benchmarks_run(arguments: list[str]) -> None:
    """Every benchmark prints a table and one JSON line with ratios and FLOPs."""
    root = Path(__file__).parents[2]
    if not (root / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not part of the wheel")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", *arguments, "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, env=_environment(root))
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["benchmark"] == arguments[0]
    assert torch.__version__.startswith(report["environment"]["torch"])
    assert all(case["rows"][case["baseline"]]["ratio"] == 1.0 for case in report["cases"])
    if arguments[0] == "custom":
        assert report["cases"][0]["flops_ratio"] == 1.0
        assert report["cases"][2]["flops_ratio"] <= 1.11
        assert 1.0 < report["cases"][1]["flops_ratio"] <= 1.25


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root / ".alias"), "OMP_NUM_THREADS": "1"}
