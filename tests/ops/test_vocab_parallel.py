"""A head whose rows lie on several processes gives what the whole head gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from many_ranks.ranks import reports, run_ranks

WORKER = Path(__file__).parent / "vocab_parallel_worker.py"
COUNT, WIDTH = 40, 6


@pytest.fixture(
    scope="module", params=[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4)], ids=["2", "4"]
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every process found; one launch."""
    folder = tmp_path_factory.mktemp("vocab")
    run_ranks(WORKER, str(folder), ranks=request.param)
    return reports(folder, request.param)


def test_agrees(found: list[dict[str, Any]]) -> None:
    """Values and all gradients in fp64, frozen and trained, K targets, cap, bias, parts of any size, chunks of any."""
    errors = found[0]["agreement"]
    assert len(errors) == 2 * (2 * 2 * 2 * 2 + 1)
    assert max(errors.values()) < 1e-12, errors
    assert found[0]["shapes"]["leading"] < 1e-14


def test_a_missing_reduction_is_noticed(found: list[dict[str, Any]]) -> None:
    """The control: without the maximum, the sums, or the gradient's reduction the same comparison is far off."""
    assert min(found[0]["controls"]) > 1e-3, found[0]["controls"]


def test_precision(found: list[dict[str, Any]]) -> None:
    """In fp32 and bf16 the parts are as near to fp64 as the whole; a confident token keeps its gradient."""
    for whole, parts in found[0]["half"].values():
        assert parts <= 1.5 * whole
    assert max(each["confident"] for each in found) < 1e-4


def test_refusals(found: list[dict[str, Any]]) -> None:
    """What ranks are not asked alike is refused on all of them, by name, and none is left waiting."""
    names = {
        "targets": "targets (their checksum)",
        "temperature": "another temperature than rank 0: 2 instead of 1",
        "gradient": "whether hidden states have a gradient",
        "count": "number of positions",
        "dtype": "dtype of the weight",
    }
    for rank, each in enumerate(found):
        for name, words in names.items():
            assert each["refusals"][name].startswith("RanksDifferError"), name
            assert words in each["refusals"][name]
        for name, own in (
            ("width", "ShapeError: hidden must be"),
            ("refused", "ConfigError: temperature must be positive"),
            ("no target", "ShapeError: targets must name a token of each position"),
            ("integers", "UnsupportedError: hidden must be one of"),
            ("no target of its own", "ShapeError: targets must name a token of each position"),
            ("integers of its own", "UnsupportedError: hidden must be one of"),
        ):
            expected = own if rank == 1 else "RanksDifferError: rank 1 was refused"
            assert each["refusals"][name].startswith(expected)
        assert each["refusals"]["bias"].startswith("ShapeError: head.bias must be [23]")
        assert each["refusals"]["outside"].startswith(f"ShapeError: targets must lie in [0, {23 * len(found)})")
        assert each["refusals"]["negative"].startswith("ShapeError: targets must lie in")


def test_costs(found: list[dict[str, Any]]) -> None:
    """Bytes and FLOPs are those of the docstring; no rank ever holds the logits of all positions."""
    ranks = len(found)
    for each in (one["costs"] for one in found):
        rows = each["rows"]
        assert each["forward"] == 16 * COUNT * (3 + 1) * (ranks - 1) / ranks
        assert each["backward"] == 2 * 8 * COUNT * WIDTH * (ranks - 1) / ranks
        assert each["agreed"] == 120 * (ranks - 1)
        assert each["flops"] == 2 * COUNT * WIDTH * rows
        assert each["more_flops"] == 4 * COUNT * WIDTH * rows
        assert each["largest"] < 8 * COUNT * max(rows, 8)
