"""Losses of pairs of torchtune and tinker-cookbook, and the latter's distillation on candidates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from .wrapped import Setting, Wrapped

__all__ = ["OTHERS", "OTHER_SETTINGS"]

_TUNE: Final = "torchtune.rlhf.loss"
_COOKBOOK: Final = "tinker_cookbook.preference.train_dpo"
_SUMS: Final = {"form": "trl"}


def tune(name: str, **settings: Any) -> Callable[..., Any]:
    """Return a loss of torchtune's, of sums of log-probs."""
    module = getattr(import_module(_TUNE), name)(**settings)

    def loss(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor) -> Any:
        return module(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)[0]

    return loss


def tune_ppo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
    """The policy's part of torchtune's PPO; its values are 0."""
    nothing = torch.zeros_like(logprobs)
    module = import_module(_TUNE).PPOLoss(value_coeff=0.0)
    return module(old_logprobs, logprobs, advantages, nothing, nothing, nothing, padding_masks=mask)[0]


def cookbook_dpo(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Any:
    """The DPO that the cookbook computes on the client, of lists of sums."""
    columns = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return import_module(_COOKBOOK).compute_dpo_loss(*(list(x) for x in columns), 0.1)


OTHERS: Final = (
    Wrapped("torchtune", "DPOLoss", f"{_TUNE}.DPOLoss", partial(tune, "DPOLoss"), _SUMS),
    Wrapped(
        "torchtune",
        "DPOLoss, label_smoothing 0.1",
        f"{_TUNE}.DPOLoss",
        partial(tune, "DPOLoss", label_smoothing=0.1),
        _SUMS,
    ),
    Wrapped("torchtune", "RSOLoss", f"{_TUNE}.RSOLoss", partial(tune, "RSOLoss"), _SUMS),
    Wrapped("torchtune", "PPOLoss", f"{_TUNE}.PPOLoss", lambda: tune_ppo),
    Wrapped("tinker-cookbook", "compute_dpo_loss", f"{_COOKBOOK}.compute_dpo_loss", lambda: cookbook_dpo, _SUMS),
)
OTHER_SETTINGS: Final = (
    Setting(
        "torchtune",
        "DPOLoss",
        f"{_TUNE}.DPOLoss",
        "label_smoothing 0.2",
        partial(tune, "DPOLoss"),
        partial(tune, "DPOLoss", label_smoothing=0.2),
        _SUMS,
    ),
)
