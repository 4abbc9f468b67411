"""AReaL's actor losses, and the one that joins reinforcement learning with distillation."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor

from .wrapped import PADDED, Wrapped

__all__ = ["AREAL"]

_FUNCTIONAL: Final = "areal.utils.functional.functional"
_ACTOR: Final = "areal.trainer.ppo.actor"


def ppo(logprobs: Tensor, prox_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
    """The clipped loss; without a correction, its sampler's log-probs are only logged."""
    function = import_module(_FUNCTIONAL).ppo_actor_loss_fn
    return function(logprobs, prox_logprobs, prox_logprobs, advantages, 0.2, mask.bool())[0]


def gspo(logprobs: Tensor, prox_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
    """The same with the ratio of a sequence."""
    function = import_module(_FUNCTIONAL).ppo_actor_loss_fn
    rows, level = advantages[:, None].expand_as(logprobs), {"importance_sampling_level": "sequence"}
    return function(logprobs, prox_logprobs, prox_logprobs, rows, 0.2, mask.bool(), **level)[0]


def sapo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
    """Sigmoid gates."""
    return import_module(_FUNCTIONAL).sapo_loss_fn(logprobs, old_logprobs, advantages, 1.0, 1.05, mask.bool())[0]


def _distilled(logprobs: Tensor, old: Tensor, teacher: Tensor, mask: Tensor, rl_weight: float) -> Any:
    """The actor's loss with a teacher; the advantages are 0, so that the teacher's part is all there is."""
    data = {
        "logprobs": old,
        "prox_logp": old,
        "advantages": torch.zeros_like(logprobs),
        "loss_mask": mask,
        "teacher_logp": teacher,
        "rl_loss_weight": rl_weight,
        "distill_loss_weight": 1.0,
    }
    actor = import_module(_ACTOR)
    clip = {"eps_clip": 0.2, "eps_clip_higher": None, "c_clip": None}
    with mock.patch.object(actor, "stats_tracker"):  # which logs, in fp32 only
        return actor.grpo_loss_fn(logprobs, torch.zeros_like(logprobs), data, **clip)


def joint(logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Any:
    """Distillation beside reinforcement learning; the policy is its own anchor."""
    return _distilled(logprobs, logprobs.detach(), teacher_logprobs, mask, 1.0)


def alone(logprobs: Tensor, old_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Any:
    """Distillation by the importance-weighted log-ratio."""
    return _distilled(logprobs, old_logprobs, teacher_logprobs, mask, 0.0)


AREAL: Final = (
    Wrapped("AReaL", "ppo", f"{_FUNCTIONAL}.ppo_actor_loss_fn", lambda: ppo),
    Wrapped(
        "AReaL", "gspo", f"{_FUNCTIONAL}.ppo_actor_loss_fn", lambda: gspo, {**PADDED, "per_sequence": ("advantages",)}
    ),
    Wrapped("AReaL", "sapo", f"{_FUNCTIONAL}.sapo_loss_fn", lambda: sapo),
    Wrapped(
        "AReaL",
        "distillation, joint (KDRL)",
        f"{_ACTOR}.grpo_loss_fn",
        lambda: joint,
        PADDED,
        estimates=True,
    ),
    Wrapped("AReaL", "distillation alone", f"{_ACTOR}.grpo_loss_fn", lambda: alone, PADDED, estimates=True),
)
