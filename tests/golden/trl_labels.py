"""What TRL's KTOTrainer answers for answers that are labelled one by one; a part of `make_trl.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from recording import Inputs, answer
from torch import Tensor
from trl.trainer.kto_trainer import KTOTrainer
from trl_trainer import stand_in

__all__ = ["label_entries"]

# Summed log-probs of answers to other prompts, of the policy and of the reference: on average 0.575 apart, or -0.575.
MISMATCHED = [[-7.3, -5.1, -6.2, -9.4], [-8.1, -5.6, -6.0, -10.6]]
LABELS = [1, 0, 1, 0]


def _kto(given: Inputs, name: str, **config: Any) -> dict[str, Any]:
    """KTOTrainer._compute_loss, with stored sums of the reference's log-probs."""
    settings = {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    settings |= {"label": LABELS, "mismatched": MISMATCHED, **config}
    leaf, mask = given["logprobs"].clone().requires_grad_(), given["mask"]
    policy, reference = (torch.tensor(sums, dtype=torch.float64) for sums in settings["mismatched"])
    nothing = torch.zeros(4, 7)  # for metrics that are not recorded here
    trainer = stand_in(
        **{key: settings[key] for key in ("loss_type", "beta", "desirable_weight", "undesirable_weight")},
        calculate_KL=settings["loss_type"] == "kto",
        precompute_ref_logps=True,
        _compute_kl_logps=lambda *_: policy,
        _total_train_tokens=0,
        _tp_size=1,
    )
    ones = torch.ones(4, 8, dtype=torch.int64)
    batch = {
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": torch.cat([torch.zeros(4, 1), mask], 1),
        "label": torch.tensor(settings["label"], dtype=torch.bool),
        "ref_logps": (given["ref_logprobs"] * mask).sum(1),
        "ref_KL_logps": reference,
    }
    loss: Tensor = KTOTrainer._compute_loss(
        trainer, MagicMock(return_value=_outputs(leaf * mask, nothing)), batch, False
    )
    place = f"{KTOTrainer.__module__}.KTOTrainer._compute_loss"
    return {"name": name, "function": place, "config": settings, "inputs": "full_rows", **answer(loss, leaf)}


def _outputs(logprobs: Tensor, nothing: Tensor) -> SimpleNamespace:
    return SimpleNamespace(log_probs=logprobs, entropy=nothing, mean_logits=nothing)


def label_entries(given: Inputs) -> list[dict[str, Any]]:
    """Return KTO with and without weights, with a z0 that is cut off at 0, and with labels of one kind only."""
    flipped = {"mismatched": MISMATCHED[::-1]}
    variants: dict[str, dict[str, Any]] = {
        "kto": {},
        "kto-weights": {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        "kto-negative": {"beta": 0.3, **flipped},
        "kto-desirable": {"label": [1, 1, 1, 1]},
        "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "beta": 0.3},
    }
    return [_kto(given, name, **config) for name, config in variants.items()]
