"""The published examples of the custom-loss interface (`tests/seed/*.txt`); they run as printed, except for EDITS."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pullback
from pullback import Datum
from pullback.datums import datum_from_tokens_weights

SEED = Path(__file__).parents[1] / "seed"
VOCAB = 4096  # the examples have tokens up to 2054

# (snippet, printed, replaced by, why)
EDITS = [
    ("weight_datum", "from tinker_cookbook.supervised.common import", "from pullback.datums import", "import"),
    ("weight_datum", "2003, ...]", "2003, 7, 9]", "literal ..."),
    ("target_datum", "import tinker\n", "", "import: `tinker` is given, with this library's names"),
    ("accumulation", "learning_rate=1e-5, ...)", "learning_rate=1e-5)", "literal ..."),
]

TINKER = SimpleNamespace(
    Datum=pullback.Datum,
    ModelInput=pullback.ModelInput,
    TensorData=pullback.TensorData,
    AdamParams=pullback.AdamParams,
)


def run(snippet: str, **names: Any) -> dict[str, Any]:
    """Run a snippet with the given names and return all names after it."""
    text = (SEED / f"{snippet}.txt").read_text()
    for which, printed, replaced, _ in EDITS:
        if which == snippet:
            assert printed in text
            text = text.replace(printed, replaced)
    namespace: dict[str, Any] = {"torch": torch, "tinker": TINKER, **names}
    exec(compile(text, f"{snippet}.txt", "exec"), namespace)
    return namespace


def weight_datums() -> list[Datum]:
    first = run("weight_datum", prompt_len=2)["datum"]
    return [first, datum_from_tokens_weights([5, 6, 7, 8], [0.0, 0.0, 1.0, 1.0])]


def raw_sum(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    loss = -torch.stack([lp.sum() for lp in logprobs_list]).sum()
    return loss, {"loss": loss.item()}
