"""What verl's workers answer: the actor's loss with its KL, and the supervised loss; a part of `make_verl.py`.

A worker's log-probs are of whole sequences. Each row is given one token of a prompt, so that the first seven positions predict
the seven of the response; what the last one predicts is no part of any loss.
"""

from __future__ import annotations

from typing import Any

import torch
from recording import Inputs, answer
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.tensordict_utils import get_tensordict
from verl.workers.config.actor import ActorConfig
from verl.workers.utils.losses import ppo_loss, sft_loss

__all__ = ["worker_entries"]

PLACE = "verl.workers.utils.losses"
HELPER = "verl.trainer.ppo.rollout_corr_helper.compute_rollout_correction_and_rejection_mask"
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1e6}  # no dual clip, as in `make_verl.py`
KL = {"use_kl_loss": True, "kl_loss_type": "low_var_kl", "kl_loss_coef": 0.04, "loss_agg_mode": "token-mean"}


def _whole(values: Tensor) -> Tensor:
    """Append the position that predicts nothing of the response."""
    return torch.nn.functional.pad(values, (0, 1))


def _nested(values: Tensor) -> Tensor:
    rows, width = values.shape
    return torch.nested.nested_tensor_from_jagged(values.flatten(), torch.arange(rows + 1) * width)


def _weights(given: Inputs, correction: dict[str, Any]) -> Tensor:
    proto, mask, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=given["old_logprobs"],
        rollout_log_prob=given["rollout_logprobs"],
        response_mask=given["mask"],
        **correction,
    )
    assert proto is not None
    assert torch.equal(mask, given["mask"])
    weights: Tensor = proto.batch["rollout_is_weights"]
    return weights


def _actor(name: str, inputs: tuple[str, Inputs], correction: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """`ppo_loss`, with the weights that the trainer would send along."""
    settings = {**CLIP, **KL, **changed}
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)
    kind, given = inputs
    leaf = given["logprobs"].clone().requires_grad_()
    ones = torch.ones(4, 8, dtype=torch.int64)
    fields = {"prompts": ones[:, :1], "responses": ones[:, 1:], "attention_mask": ones, "response_mask": given["mask"]}
    fields |= {"old_log_probs": given["old_logprobs"], "advantages": given["advantages"]}
    fields["ref_log_prob"] = given["ref_logprobs"]
    made: dict[str, Any] = {}
    if correction:
        fields["rollout_is_weights"] = _weights(given, correction)
        made["weights"] = fields["rollout_is_weights"].tolist()
    whole = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    loss, _ = ppo_loss(config, {"log_probs": _whole(leaf).flatten()}, get_tensordict(fields, whole))
    part = f"{HELPER} + " if correction else ""
    return {
        "name": name,
        "function": f"{part}{PLACE}.ppo_loss",
        "config": {**settings, **correction},
        "inputs": kind,
        **answer(loss, leaf),
        **made,
    }


def _supervised(name: str, inputs: tuple[str, Inputs], padded: bool) -> dict[str, Any]:
    """`sft_loss`; without padding the mask is of whole sequences, and is shifted by verl."""
    kind, given = inputs
    leaf = given["logprobs"].clone().requires_grad_()
    if padded:
        logprobs, fields = leaf, {"response_mask": given["mask"]}
    else:
        prompt = torch.zeros(4, 1, dtype=torch.float64)
        logprobs, fields = _nested(_whole(leaf)), {"loss_mask": _nested(torch.cat([prompt, given["mask"]], 1))}
    mode = DatasetPadMode.LEFT_RIGHT if padded else DatasetPadMode.NO_PADDING
    others = {"pad_mode": mode, "dp_size": 1, "batch_num_tokens": int(given["mask"].sum())}
    data: TensorDict = get_tensordict(fields, others)
    loss, _ = sft_loss(None, {"log_probs": logprobs}, data)
    config = {"pad_mode": mode.value, "dp_size": 1, "batch_num_tokens": others["batch_num_tokens"]}
    return {"name": name, "function": f"{PLACE}.sft_loss", "config": config, "inputs": kind, **answer(loss, leaf)}


def worker_entries(given: dict[str, Inputs]) -> list[dict[str, Any]]:
    """Return GRPO with its KL, with truncated weights too, and cross-entropy."""
    tokens, rows = (("tokens", given["tokens"]), ("rows", given["rows"]))
    token = {"rollout_is": "token", "rollout_is_threshold": 1.5}
    sequence = {"rollout_is": "sequence", "rollout_is_threshold": 2.0}
    norm = {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 16}
    return [
        _actor("grpo_kl-tokens", tokens, {}),
        _actor("grpo_kl-rows", rows, {}, loss_agg_mode="seq-mean-token-mean"),
        _actor("grpo_kl-rows-norm-16", rows, {}, **norm),
        _actor("grpo_kl-tokens-k2", tokens, {}, kl_loss_type="k2"),
        _actor("grpo_kl-tokens-k3+", tokens, {}, kl_loss_type="k3+"),
        _actor("tis-token-kl", tokens, token),
        _actor("tis-sequence-kl", rows, sequence),
        _supervised("cross_entropy-tokens", tokens, padded=False),
        _supervised("cross_entropy-rows", rows, padded=False),
        _supervised("cross_entropy-padded", tokens, padded=True),
    ]
