"""What the tests of Fireworks' SDK share: data by what a loss reads, and clients that let go of their models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import make_data
from servers import rest
from torch import Tensor

from pullback.backends import AdamParams
from pullback.datums import Datum

sdk = pytest.importorskip("fireworks.training.sdk", reason="Fireworks' SDK is not installed: pip install fireworks-ai")
DATA = make_data([6, 5, 7, 4])
PARAMS = AdamParams(learning_rate=1e-2)
READ = {
    "cross_entropy": ("target_tokens", "weights"),
    "ppo": ("target_tokens", "weights", "logprobs", "advantages"),
    "grpo": ("target_tokens", "weights", "logprobs", "advantages", "group_id"),
    "dpo": ("target_tokens", "weights", "ref_logprobs"),
}
SUMS = [
    (loss, mode) for loss in ("cross_entropy", "ppo") for mode in (None, "none", "num_loss_tokens", "num_sequences")
]
MEANS = [(loss, mode) for loss in ("grpo", "dpo") for mode in (None, "none")]


def given(loss: str) -> list[Datum]:
    """What a loss reads, and no more."""
    return [Datum(d.model_input, {k: d.loss_fn_inputs[k] for k in READ[loss]}) for d in DATA]


def confidence(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.stack([x.exp().mean() for x in logprobs]).sum(), {"mine": 1.0}


def finish(client: Any, url: str) -> None:
    """Let go of a client's models: this SDK has no end of a session."""
    with rest(url) as http:
        http.post(f"sessions/{client.holder.get_session_id()}/finish", json={})
    client.close()


def trainer(fireworks: Any, **options: Any) -> Any:
    return fireworks.create_lora_training_client("tiny", **{"rank": 4, "seed": 3, **options})
