"""One process of two fails: both have the error, nothing has changed, and what comes next is what one process does.

After a process is lost, the other one says so, in time and from then on, and a new start from the last checkpoint ends where a
run that nothing has interrupted does.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import failing_ranks
from many_ranks.failing_cases import CASES, PATIENCE, SECONDS, WORKS
from many_ranks.lost_groups import ALONE
from many_ranks.outcomes import Outcome
from many_ranks.ranks import reports, run_ranks

pytestmark = [
    pytest.mark.slow,  # all cases share two processes, whose start costs most
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
SCRIPT = Path(failing_ranks.__file__)
EXACT = 1e-12
FAILED = r"failed on rank 1 \(nothing has changed on any rank\): "
DIFFERS = "rank 1 was given another "
START_AGAIN = "Start all processes again and load the last checkpoint"
LOST = f"another process has stopped, or did not answer in time .*{START_AGAIN}"
Expected = tuple[tuple[str, str], ...]


def both(words: str) -> Expected:
    return (("RanksDifferError", DIFFERS + words),) * 2


def apart(operation: str) -> Expected:
    words = f"rank 0 is at 'forward: .*', rank 1 at '{operation}: .*'; every rank must run the same script"
    return (("RanksDifferError", words),) * 2


def rank_1(kind: str, words: str, operation: str = "") -> Expected:
    return ("RankFailedError", rf"{operation}.*{FAILED}{kind}: [\s\S]*{words}"), (kind, words)


# The errors of rank 0 and rank 1: type, and words.
EXPECTED: dict[str, Expected] = {
    "loss raises": rank_1("ValueError", "no such reward"),
    "registered loss raises": rank_1("ValueError", "no such token"),
    "loss raises on rank 0": (
        ("ValueError", "no such reward"),
        ("RankFailedError", r"failed on rank 0 \(nothing .*ValueError: no such reward"),
    ),
    "invalid data": rank_1("InvalidDatumsError", "datum 2: .* position 11: 99"),
    "no data": rank_1("InvalidDatumsError", "data is empty"),
    "other tokens": both("batch .*datum 5 differs"),
    "fewer datums": both("batch .*4 of them instead of 8"),
    "other order": both("batch .*datum 0 differs .8 in all"),
    "other loss": both('loss .*"ppo .* instead of "cross_entropy '),
    "other hyperparameters": both("loss .*low=0.7.* instead of .*low=0.8"),
    "other counts": both("loss .*'tokens', 9.0.* instead of .*'tokens', 10.0"),
    "other AdamParams": both(".*learning_rate=0.02.* instead of .*learning_rate=0.01"),
    "other normalization": both(".*divided by 1.0.* instead of .*divided by 6.0"),
    "other operation": apart("forward_backward"),
    "step against forward": apart("optim_step"),
    "sample against forward": apart("sample"),
    "other prompts": both("list of prompts"),
    "other checkpoint": both("checkpoint .*/a .* instead of .*/b "),
    "unwritable folder": (
        ("NotADirectoryError", "below"),
        ("RankFailedError", "save_weights failed on rank 0 .*NotADirectoryError"),
    ),
    "random loss": rank_1("RanksDifferError", "datum 0: random has another gradient .*; .*seed what it draws"),
    "forward inside a loss": rank_1("InvalidDatumsError", "datum 0", "forward_backward_custom > forward"),
    "forward_retain": rank_1("InvalidDatumsError", "datum 2", "forward_retain"),
    "float16 on one rank": both('loss .*"ppo .*, autocast to torch.float16 on cpu" instead of'),
    "float16": (("UnsupportedError", "torch.autocast computes in float16 .* use bfloat16"),) * 2,
    "float16, retained": (("UnsupportedError", "torch.autocast computes in float16"),) * 2,
    "optimizer": (
        ("RankFailedError", r"failed on rank 1 \(other ranks have changed their weights already\): OutOfMemory"),
        ("OutOfMemoryError", "planted"),
    ),
    "other weights": both("model .*its parameter embedding differs .11 in all"),
    "other budget": both(".*'token_budget': 65.* instead of .*'token_budget': 64"),
    "other seed": both(".*'seed': 1.* instead of .*'seed': 0"),
    "nothing trained": both("model .*its parameter embedding differs"),
    "missing checkpoint": (("CheckpointError", "has no manifest.json"),) * 2,
    "other dtype": (("CheckpointError", "differs in: .*torch.float32, here .*torch.float64"),) * 2,
    "other shape": (("CheckpointError", r"differs in: .*positions \[32, 8\] .*, here \[64, 8\]"),) * 2,
    "other moments": (
        (
            "CheckpointError",
            "optimizer.safetensors of .*differs in: .*exp_avg_sq:norm .*torch.float32, here .*torch.float64",
        ),
    )
    * 2,
    "kill": (("LostRankError", f"forward_backward_custom: {LOST}"),),
    "stall": (("LostRankError", f"forward_backward_custom: {LOST}"),) * 2,
    "layer": (("LostRankError", f"forward_backward: {LOST}"), ("ValueError", "in the second layer")),
    "layer, no memory": (
        ("LostRankError", f"forward_backward: {LOST}"),
        ("LostRankError", f"forward_backward: .*memory ran out .*planted.*{START_AGAIN}.*reshard=False"),
    ),
}


def launched(what: str, folder: Path, killed: bool = False) -> list[Outcome]:
    """Return what each rank that has lived to the end was told."""
    run_ranks(SCRIPT, what, str(folder), ends=(0, -signal.SIGKILL if killed else 0))
    return reports(folder, 1 if killed else 2, f"{what}-")


def require_told(found: Outcome, expected: tuple[str, str], seconds: float) -> None:
    kind, words = expected
    assert found["type"] == kind, found["words"]
    assert re.search(words, found["words"]), found["words"]
    assert found["seconds"] < seconds


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return launched("together", tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("kind", ["whole", "resharded"])
@pytest.mark.parametrize("case", CASES)
def test_a_failure_on_one_rank_is_everybodys(case: str, kind: str, together: list[Outcome]) -> None:
    for found, expected in zip(together, EXPECTED[case], strict=True):
        told = found[f"{case}, {kind}"]
        require_told(told, expected, PATIENCE / 2)
        assert told["moved"] == 0.0, "the gradients that had accumulated"
        assert told["next"] <= EXACT, "weights after the next step, against one process"


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("work", WORKS)
def test_all_ranks_try_again_where_one_runs_out_of_memory(work: str, after: int, together: list[Outcome]) -> None:
    for found in together:
        told = found[f"{work}, memory short once after {after}"]
        assert told["type"] == "NoneType", told["words"]
        assert told["next"] <= EXACT


@pytest.mark.parametrize("work", WORKS)
def test_where_memory_never_suffices_on_one_rank_all_say_so(work: str, together: list[Outcome]) -> None:
    for found in together:
        told = found[f"{work}, no memory"]
        words = "a datum of 12 tokens does not fit .* even alone .rank 1 ran out of memory.*gradient_checkpointing"
        require_told(told, ("UnsupportedError", words), PATIENCE / 2)
        assert told["moved"] == 0.0


def test_a_step_that_only_some_ranks_have_made_is_followed_by_a_load(together: list[Outcome]) -> None:
    for found, expected in zip(together, EXPECTED["optimizer"], strict=True):
        told = found["optimizer"]
        require_told(told, expected, PATIENCE / 2)
        require_told(told["again"], ("BackendError", "load the last checkpoint"), PATIENCE / 2)
        assert told["next"] <= EXACT


@pytest.mark.parametrize(
    "case", ["other weights", "other budget", "other seed", "nothing trained", "missing checkpoint"]
)
def test_other_models_settings_and_folders_are_refused(case: str, together: list[Outcome]) -> None:
    for found, expected in zip(together, EXPECTED[case], strict=True):
        require_told(found[case], expected, PATIENCE / 2)


@pytest.mark.parametrize("case", ["other dtype", "other shape", "other moments"])
def test_files_of_other_tensors_are_refused_before_any_work(case: str, together: list[Outcome]) -> None:
    for found, expected in zip(together, EXPECTED[case], strict=True):
        require_told(found[case], expected, PATIENCE / 2)
        assert found[case]["moved"] == 0.0


def test_without_agreements_other_data_on_one_rank_goes_unnoticed(together: list[Outcome]) -> None:
    """The negative control: the gradient of a batch that nobody was given."""
    for found in together:
        assert found["silent"]["type"] == "NoneType"
        assert found["silent"]["moved"] > 0.1


@pytest.fixture(scope="module", params=ALONE)
def lost(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Outcome]]:
    folder = tmp_path_factory.mktemp("lost")
    return request.param, folder, launched(request.param, folder, killed=request.param == "kill")


def test_a_lost_rank_is_named_in_time_and_from_then_on(lost: Any) -> None:
    case, _, told = lost
    for found, expected in zip(told, EXPECTED[case], strict=True):
        require_told(found, expected, 3 * SECONDS)
        assert found["moved"] == 0.0, "this process's part of the gradients that had accumulated"
        for later in found["later"]:
            require_told(later, ("LostRankError", f"cannot run: .*{START_AGAIN}"), SECONDS)


def test_a_new_start_from_the_last_checkpoint_is_exact(lost: Any) -> None:
    _, folder, _ = lost
    for found in launched("resume", folder):
        assert found["apart"] <= EXACT
