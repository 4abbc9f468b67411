"""What the arguments of a loss are called in this field, and what they stand for."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["FIELD_OF", "KNOWN", "role_of"]

_LOGPROBS: Final = re.compile(r"log_?p(?:rob)?s?(?![a-z])")
_NOISE: Final = re.compile(r"per_token_|_?(?:tensor|policy|model)(?=_|$)|^(?:policy|model)_")

# role -> the names that it has; log_probs, log_prob, logps and logp have been spelt logprobs before
KNOWN: Final[dict[str, tuple[str, ...]]] = {
    "policy": (
        "logprobs",
        "new_logprobs",
        "current_logprobs",
        "curr_logprobs",
        "cur_logprobs",
        "lp",
        "student_logprobs",
    ),
    "weights": ("weights", "weight", "loss_weights", "token_weights"),
    "mask": (
        "mask",
        "response_mask",
        "completion_mask",
        "loss_mask",
        "action_mask",
        "token_mask",
        "masks",
        "loss_masks",
    ),
    "attention_mask": ("attention_mask", "padding_mask"),
    "advantages": ("advantages", "advantage", "adv", "advs"),
    "rewards": ("rewards", "reward", "sequence_rewards", "outcome_rewards"),
    "old": (
        "old",
        "old_logprobs",
        "prev_logprobs",
        "previous_logprobs",
        "anchor",
        "prox_logprobs",
        "proximal_logprobs",
    ),
    "ref": ("ref", "reference", "ref_logprobs", "reference_logprobs", "base_logprobs", "teacher_logprobs"),
    "rollout": (
        "rollout",
        "rollout_logprobs",
        "sampling_logprobs",
        "sampler_logprobs",
        "behaviour_logprobs",
        "behavior_logprobs",
        "inference_logprobs",
        "generator_logprobs",
        "vllm_logprobs",
    ),
    "chosen": ("chosen", "chosen_logprobs"),
    "rejected": ("rejected", "rejected_logprobs"),
    "ref_chosen": ("ref_chosen", "ref_chosen_logprobs", "reference_chosen_logprobs"),
    "ref_rejected": ("ref_rejected", "ref_rejected_logprobs", "reference_rejected_logprobs"),
    "labels": ("labels",),
    "count": ("num_items_in_batch", "num_tokens", "num_loss_tokens", "token_count"),
    "groups": ("group_id", "group_ids", "groups", "group_index"),
    "inputs": ("inputs", "batch"),
}
FIELD_OF: Final = {
    "advantages": "advantages",
    "rewards": "advantages",
    "old": "old_logprobs",
    "ref": "ref_logprobs",
    "rollout": "rollout_logprobs",
    "ref_chosen": "ref_logprobs",
    "ref_rejected": "ref_logprobs",
}
_ROLE: Final = {name: role for role, names in KNOWN.items() for name in names}


def role_of(name: str) -> str | None:
    """Return what an argument stands for, by its name; None if nothing is known by that name."""
    plain = _LOGPROBS.sub("logprobs", name.lower())
    for spelling in (plain, _NOISE.sub("", plain).strip("_")):
        if spelling in _ROLE:
            return _ROLE[spelling]
    return None
