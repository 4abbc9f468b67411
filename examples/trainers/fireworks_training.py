"""GRPO through the training SDK of Fireworks: each call sends its share of the step, divided by the tokens of all calls.

Its custom calls accept datums of target tokens and weights alone, so what the loss reads beside them stays here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toy_rows import rows, toy_model

from pullback.datums import Datum, datum_from_rollout, to_fireworks
from pullback.losses import GRPO
from pullback.service import Base, ServedModels, serving

LOSS = GRPO()
SENT = ("target_tokens", "weights")


def train_step(client: Any, calls: Sequence[Sequence[Datum]], params: Any) -> list[dict[str, float]]:
    """Make one step on several calls of datums; return the metrics of each."""
    share = LOSS.with_counts(**LOSS.counts([datum for call in calls for datum in call]))
    metrics = []
    for call in calls:
        sent = to_fireworks([Datum(d.model_input, {key: d.loss_fn_inputs[key] for key in SENT}) for d in call])
        result = client.forward_backward_custom(sent, lambda _, logprobs, call=call: share(call, logprobs)).result()
        metrics.append(result.metrics)
    client.optim_step(params, grad_accumulation_normalization="none").result()  # it has been divided
    return metrics


def main() -> None:
    from fireworks.training import sdk

    tokens = [row["input_ids"] for row in rows()]
    data = [datum_from_rollout(t[:3], t[3:], [-4.0] * len(t[3:]), 1 - 2 * (i % 2)) for i, t in enumerate(tokens)]
    with tempfile.TemporaryDirectory() as folder:
        models = ServedModels(Base("toy", toy_model(), None, {}), Path(folder))
        with serving(models) as url:
            service = sdk.ServiceClient(base_url=url, api_key="tml-local")
            client = service.create_lora_training_client("toy", rank=4, train_unembed=False)
            for step in range(4):
                made = train_step(client, [data[:2], data[2:5], data[5:]], sdk.AdamParams(learning_rate=1e-2))
                print(step, [round(metrics["loss_per_unit:mean"], 4) for metrics in made])
            service.close()


if __name__ == "__main__":
    main()
