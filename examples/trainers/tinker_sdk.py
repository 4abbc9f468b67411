"""GRPO through the SDK of Tinker: each call sends its share of the step, divided by the tokens of all calls.

The service adds up what the calls send, and divides by nothing. Any service of the Tinker API will do; here it is our own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tinker
from toy_rows import rows, toy_model

from pullback.datums import datum_from_rollout, to_tinker
from pullback.losses import GRPO
from pullback.service import Base, ServedModels, serving

LOSS = GRPO()


def train_step(client: Any, calls: Sequence[Sequence[Any]], params: Any) -> list[dict[str, float]]:
    """Make one step on several calls of datums; return the metrics of each."""
    share = LOSS.with_counts(**LOSS.counts([datum for call in calls for datum in call]))
    sent = [client.forward_backward_custom(list(call), share) for call in calls]
    client.optim_step(params).result()
    return [each.result().metrics for each in sent]


def rollouts() -> list[Any]:
    """Return completions that were sampled, with their advantages, for the SDK."""
    made = rows()
    return to_tinker(
        [
            datum_from_rollout(
                row["input_ids"][:3], row["input_ids"][3:], [-4.0] * (len(row["labels"]) - 3), 1 - 2 * (i % 2)
            )
            for i, row in enumerate(made)
        ]
    )


def main() -> None:
    data = rollouts()
    with tempfile.TemporaryDirectory() as folder:
        models = ServedModels(Base("toy", toy_model(), None, {}), Path(folder))
        with serving(models) as url, tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
            client = service.create_lora_training_client("toy", rank=4).result()
            for step in range(4):
                made = train_step(client, [data[:2], data[2:5], data[5:]], tinker.AdamParams(learning_rate=1e-2))
                print(step, [round(metrics["loss_per_unit:mean"], 4) for metrics in made])


if __name__ == "__main__":
    main()
