"""What is trained is chosen when a backend is made: a gradient that would be lost is refused by all processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import trained_ranks
from many_ranks.ranks import found_by_ranks
from many_ranks.trained_ranks import ALONE, CALLS, CASES, FROZEN, PENALTIES, STATES, UNLIKE, kind_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]
pytest.importorskip("peft", reason="adapters are peft's (extra hf)")
EXACT = 1e-12
Found = dict[str, Any]
OTHERS = "ask for a gradient, and this backend does not train them"
UNREACHED = "was reached by the gradient"
REFUSED = {
    "unfrozen": OTHERS,
    "replaced": "norm was replaced after the backend was made",
    "replaced by what is frozen": "norm was replaced after the backend was made",
    "a tied one replaced": "embed_tokens.weight was replaced after the backend was made",
    "cut head replaced": "unembedding was replaced after the backend was made.*nothing would be computed with it",
    "all frozen": UNREACHED,
    "head alone": "only the head is trained, which cannot be spread over processes",
    "merged": "adapter is merged into 14 layers",
    "switched off": UNREACHED,
    "another adapter": OTHERS,
    "another dtype": "was torch.float64 when the model was sharded, and is torch.float32",
}
# Scores of these would be of other weights than those that the model shows; the others may be scored.
SCORED: set[str] = {"unfrozen", "all frozen", "head alone", "switched off", "another adapter"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return found_by_ranks(Path(trained_ranks.__file__), tmp_path_factory.mktemp("two"), seconds=400)


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", CASES)
def test_changed_on_all_ranks(case: str, state: str, reshard: bool, two: list[Found]) -> None:
    """All of them raise the error of one process, at once, and what had accumulated stays."""
    for found in two:
        told = found[kind_of(case, state, reshard)]
        for call in CALLS:
            assert told[call]["type"] == "BackendError", told[call]
            assert re.search(REFUSED[case], told[call]["words"]), told[call]
            assert told[call]["seconds"] < 20
        assert told["forward"]["type"] == ("NoneType" if case in SCORED else "BackendError"), told["forward"]
        assert told["moved"] == 0.0


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize(
    ("case", "state"),
    [*((case, "gathered") for case in ALONE), *((case, state) for case in UNLIKE for state in STATES)],
)
def test_changed_on_one_rank(case: str, state: str, reshard: bool, two: list[Found]) -> None:
    """The other would wait in a sum of other gradients, or be ended by gloo; it has the same words, or both are shown."""
    for rank, found in enumerate(two):
        told = found[kind_of(case, state, reshard, "one")]
        for call in CALLS:
            words = told[call]["words"]
            if told[call]["type"] == "RanksDifferError":
                assert re.search(r"rank 1 was given another .*, with [0-9]+ weights frozen since", words), words
            else:
                assert told[call]["type"] == ("BackendError" if rank else "RankFailedError"), told[call]
                assert re.search(REFUSED[case], words), words
            assert told[call]["seconds"] < 20
        assert told["moved"] == 0.0


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", FROZEN)
def test_frozen_since(case: str, state: str, reshard: bool, two: list[Found]) -> None:
    """It stays where it is, whichever of FSDP's two forms was frozen, and the others are trained: a negative control."""
    for found in two:
        assert found[kind_of(f"{case} frozen", state, reshard)] < EXACT
        assert found[kind_of("back", "gathered", reshard)] < EXACT


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_loss_of_the_weights_themselves(penalty: str, reshard: bool, two: list[Found]) -> None:
    """A penalty would train nothing, in whichever form the loss has the weights; as a constant it does no harm."""
    for found in two:
        told = found[kind_of(penalty, "gathered", reshard)]
        assert told["type"] == "LossError", told
        assert "that is trained here, beside the log-probs" in told["words"]
        assert told["apart"] < EXACT
