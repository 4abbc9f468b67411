"""What the tests of the official SDK share: data by what a loss reads, and a client that trains."""

from __future__ import annotations

from typing import Any

import tinker
from helpers import make_data

from pullback.datums import Datum
from pullback.losses import registry

__all__ = ["DATA", "read_by", "trainer"]

DATA = make_data([6, 5, 7, 4])


def read_by(loss: str, data: list[Datum] = DATA) -> list[Datum]:
    """Datums with the inputs of a loss, and no others."""
    made = registry.build(loss)
    kept = {"target_tokens", *made.required_inputs, *made.optional_inputs}
    return [Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k in kept}) for d in data]


def trainer(service: tinker.ServiceClient, **options: Any) -> tinker.TrainingClient:
    """A training client on a fresh adapter, the same each time."""
    return service.create_lora_training_client("tiny", **{"rank": 4, "seed": 3, **options}).result()
