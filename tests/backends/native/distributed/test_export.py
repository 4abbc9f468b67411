"""What several processes export is, file by file and bit by bit, what one process exports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import exporting_ranks
from many_ranks.exporting_ranks import CASES, FEW
from many_ranks.ranks import reports, run_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"
)
pytest.importorskip("transformers", reason="the models are those of transformers (extra hf)")
pytest.importorskip("peft", reason="adapters are those of peft (extra hf)")
Found = dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, "few"), marks=pytest.mark.slow),
        pytest.param((2, "whole"), marks=pytest.mark.soak),
        pytest.param((4, "whole"), marks=pytest.mark.soak),
    ],
    ids=["2 few", "2", "4"],
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    ranks, what = request.param
    folder = tmp_path_factory.mktemp("export")
    run_ranks(Path(exporting_ranks.__file__), str(folder), what, ranks=ranks, seconds=900)
    return reports(folder, ranks)


def test_files_are_those_of_one_process(found: list[Found]) -> None:
    """Weights, adapters and configs; and the model that was exported is the same before and after."""
    assert found[0].keys() - {"failures"} in (set(FEW), set(CASES))
    for each in found:
        for name in each.keys() - {"failures"}:
            assert each[name]["differ"] == [], name
            expected = "adapter_model.safetensors" if name == "adapter, alone" else "model.safetensors"
            assert expected in each[name]["files"]
            assert each[name]["same path"]
            assert each[name]["unchanged"]


def test_the_bytes_of_a_checkpoint_are_known_before(found: list[Found]) -> None:
    """Of everything, and of the weights alone: to 2 %, also where fp32 shards stand for bfloat16 weights."""
    for each in found:
        for name in each.keys() - {"failures"}:
            for said, written in each[name]["bytes"]:
                assert said <= written <= 1.02 * said, (name, said, written)


def test_failures_are_everybodys(found: list[Found]) -> None:
    """All ranks have an error, whichever of them has failed; nothing is written, and gradients are as they were."""
    both = {
        "taken": "CheckpointError: .*taken exists",
        "other folders": "RanksDifferError: export: rank 1 was given another export than rank 0",
        "other choices": "RanksDifferError: .*merged=False.* instead of .*merged=True",
        "dtype": "ConfigError: .*an adapter alone is written as it is",
        "beside": "UnsupportedError: weights are trained beside the adapter",
        "own": "UnsupportedError: export writes models of transformers .HFModel., not TinyLM",
    }
    for rank, each in enumerate(found):
        failures = each["failures"]
        for name, words in both.items():
            assert_matches(failures[name], words)
        first = (
            "NotADirectoryError|FileExistsError" if rank == 0 else "RankFailedError: export failed on rank 0 .*Error"
        )
        assert_matches(failures["below a file"], first)
        assert failures["moved"] == 0.0
        assert failures["written"] == []


def assert_matches(found: str, words: str) -> None:
    assert re.match(words, found), found
