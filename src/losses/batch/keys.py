"""The inputs a datum may carry beside its tokens: names, dtypes, meaning.

Every per-token input has the shape of ``target_tokens``: entry j belongs to ``target_tokens[j]``,
the token that follows ``model_input[j]``. No loss shifts or slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

__all__ = ["INPUT_KEYS", "PER_SEQUENCE", "PER_TOKEN", "ROLE_CHOSEN", "ROLE_GOLD", "ROLE_REJECTED", "InputKey"]

ROLE_REJECTED: Final = 0
ROLE_CHOSEN: Final = 1
ROLE_GOLD: Final = 2


@final
@dataclass(frozen=True)
class InputKey:
    """One entry of ``loss_fn_inputs``: its name, dtype, and whether there is one number per token."""

    name: str
    dtype: Literal["int64", "float32"]
    per_token: bool
    meaning: str


_KEYS = (
    InputKey("target_tokens", "int64", True, "token that follows each input token"),
    InputKey("weights", "float32", True, "0 = not trained; otherwise the weight of the token"),
    InputKey("advantages", "float32", True, "advantage of each token; positive = more of this"),
    InputKey("logprobs", "float32", True, "log-probs of the rollout policy (the sampler), at its temperature"),
    InputKey(
        "old_logprobs",
        "float32",
        True,
        "log-probs of the proximal anchor, where it differs from the sampler; a correction needs them: a ratio to the sampler "
        "contains the mismatch already, and a weight would count it twice",
    ),
    InputKey("ref_logprobs", "float32", True, "log-probs of the frozen reference"),
    InputKey("sequence_ratio_mask", "float32", True, "1 on the tokens that a sequence's ratio is taken over, else 0"),
    InputKey("pair_id", "int64", False, "which preference pair the sequence belongs to"),
    InputKey("role", "int64", False, "0 rejected, 1 chosen, 2 gold"),
    InputKey("group_id", "int64", False, "which prompt group the sequence belongs to"),
    InputKey("label", "int64", False, "1 desirable, 0 undesirable"),
    InputKey(
        "reference_point",
        "float32",
        False,
        "KTO's z0, nats: the KL of policy and reference, measured on answers to other prompts; at least 0",
    ),
    InputKey("weights_version", "int64", False, "optimizer steps that the sampler's weights had seen"),
    InputKey("temperature", "float32", False, "temperature the completion was sampled at, and is scored at"),
    InputKey("top_p", "float32", False, "nucleus mass the completion was sampled from"),
)

INPUT_KEYS: Final = {key.name: key for key in _KEYS}
PER_TOKEN: Final = tuple(key.name for key in _KEYS if key.per_token)
PER_SEQUENCE: Final = tuple(key.name for key in _KEYS if not key.per_token)
