"""What SkyRL's policy worker answers: the whole loss of a micro-batch with its KL; a part of `make_skyrl.py`.

The worker's method is called as it is on a stand-in for the worker, whose model returns prepared log-probs and whose strategy
keeps the loss that it is to differentiate.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from recording import Inputs, answer
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
from skyrl.train.config.config import AlgorithmConfig, OffPolicyCorrectionConfig
from torch import Tensor

__all__ = ["worker_entries"]

UTILS = ppo_utils.__name__
PLACE = f"{PolicyWorkerBase.__module__}.PolicyWorkerBase._forward_backward_micro"
CLIP_KL = {
    "policy_loss_type": "regular",
    "eps_clip_low": 0.2,
    "eps_clip_high": 0.28,
    "use_kl_loss": True,
    "kl_loss_coef": 0.04,
}


def _micro_batch(leaf: Tensor, given: Inputs, advantages: Tensor, config: AlgorithmConfig) -> Tensor:
    """Return the loss that the worker differentiates for one micro-batch on one process."""
    losses: list[Tensor] = []
    worker = MagicMock()
    worker.cfg = SimpleNamespace(algorithm=config)
    worker.model = MagicMock(return_value=(leaf, {"entropy": torch.zeros(4, 9)}))  # its entropy is not in the loss
    worker.policy_loss_fn = ppo_utils.ppo_policy_loss
    worker.mesh_rank.dp_size = 1
    worker.strategy.backward = lambda loss, *_: losses.append(loss)
    experience = MagicMock(
        action_log_probs=given["old_logprobs"],
        base_action_log_probs=given["ref_logprobs"],
        rollout_logprobs=given["rollout_logprobs"],
        advantages=advantages,
        num_actions=7,
        loss_mask=given["mask"],
        response_mask=given["mask"],
    )
    with patch("torch.cuda.current_device", return_value="cpu"):
        PolicyWorkerBase._forward_backward_micro(worker, experience, 1.0)
    (loss,) = losses
    return loss


def _policy(
    name: str, inputs: tuple[str, Inputs], reduction: str, correction: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The worker on advantages that carry the reduction, as `policy` of `make_skyrl.py`."""
    kind, given = inputs
    settings: dict[str, Any] = {**CLIP_KL, "kl_estimator_type": "k3", "loss_reduction": reduction}
    parts = {} if correction is None else {"off_policy_correction": OffPolicyCorrectionConfig(**correction)}
    advantages = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        given["advantages"], given["mask"], reduction, 4, 16, [(0, 2), (2, 4)]
    )
    leaf = given["logprobs"].clone().requires_grad_()
    loss = _micro_batch(leaf, given, advantages, AlgorithmConfig(**settings, **parts))
    return {
        "name": name,
        "function": f"{UTILS}.apply_loss_reduction_to_advantages_minibatch + {PLACE}",
        "config": settings if correction is None else {**settings, "off_policy_correction": correction},
        "inputs": kind,
        **answer(loss, leaf),
    }


def worker_entries(given: dict[str, Inputs]) -> list[dict[str, Any]]:
    """Return PPO with its KL, and with truncated weights too."""
    tokens, rows = (("tokens", given["tokens"]), ("rows", given["rows"]))
    token = {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.5}
    sequence = {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 2.0}
    return [
        _policy("ppo_kl-tokens", tokens, "sequence_mean"),
        _policy("ppo_kl-rows", rows, "sequence_mean"),
        _policy("ppo_kl-token_mean", tokens, "token_mean"),
        _policy("tis-token-kl", tokens, "sequence_mean", token),
        _policy("tis-sequence-kl", rows, "sequence_mean", sequence),
    ]
