"""What TRL's SFTTrainer answers: cross-entropy; a part of `make_trl.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from recording import Inputs, answer
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer
from trl_trainer import stand_in

__all__ = ["supervised_entries"]


def _sft(name: str, inputs: tuple[str, Inputs], items: int | None) -> dict[str, Any]:
    """SFTTrainer.compute_loss; ``items`` are the tokens of the whole batch, where the trainer counts them."""
    kind, given = inputs
    leaf, mask = given["logprobs"].clone().requires_grad_(), given["mask"]
    nothing = torch.zeros(4, 7)  # for metrics that are not recorded here
    outputs = SimpleNamespace(log_probs=leaf * mask, label_mask=mask.bool(), entropy=nothing, is_top1=nothing.bool())
    trainer = stand_in(
        compute_loss_func=None,
        label_smoother=None,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.accelerator.parallelism_config = None
    ones = torch.ones(4, 8, dtype=torch.int64)
    batch = {"input_ids": ones, "attention_mask": ones, "labels": ones}
    loss: Tensor = SFTTrainer.compute_loss(trainer, MagicMock(return_value=outputs), batch, num_items_in_batch=items)
    return {
        "name": name,
        "function": f"{SFTTrainer.__module__}.SFTTrainer.compute_loss",
        "config": {"loss_type": "nll", "num_items_in_batch": items},
        "inputs": kind,
        **answer(loss, leaf),
    }


def supervised_entries(given: dict[str, Inputs]) -> list[dict[str, Any]]:
    """Return cross-entropy over the tokens of the micro-batch, and over a count that the trainer gives."""
    tokens, rows = (("tokens", given["tokens"]), ("rows", given["rows"]))
    return [
        _sft("cross_entropy-tokens", tokens, None),
        _sft("cross_entropy-rows", rows, None),
        _sft("cross_entropy-counted", tokens, 40),
    ]
