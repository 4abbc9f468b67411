"""What TRL's GRPOTrainer answers, with the weights of its sampler; a part of `make_trl.py`.

The sampler's weights are computed inside the method that generates; that block of its source is run on prepared log-probs.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from types import SimpleNamespace
from typing import Any

import torch
from recording import Inputs, answer, golden_inputs
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl_trainer import stand_in

__all__ = ["grpo", "penalty"]

INPUTS = golden_inputs()
GRPO = "trl.trainer.grpo_trainer.GRPOTrainer"
DEFAULTS: dict[str, Any] = {
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "importance_sampling_level": "token",
    "delta": None,
    "off_policy_mask_threshold": None,
    "max_completion_length": 16,
}
ARGUMENTS = ("use_bias_correction_kl", "delta")  # read from trainer.args, the others from the trainer


def sampler_weights(given: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """Run the block of the generating method that makes the weights of the sampler's log-probs."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    head = "            # Compute the importance sampling ratio when using vLLM"
    block = source[source.index(head) :]
    block = block[: block.index("            # Compute the per-token log probabilities for the reference model")]
    names = {
        "self": SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=True, **settings),
        "completion_mask": given["mask"],
        "tool_mask": None,
        "old_per_token_logps": given["old_logprobs"],
        "sampling_per_token_logps": given["rollout_logprobs"],
        "torch": torch,
        "math": math,
    }
    exec(textwrap.dedent(block), names)
    return names["vllm_importance_sampling_ratio"]  # type: ignore[return-value]


def grpo(name: str, inputs: str, **config: Any) -> dict[str, Any]:
    """GRPOTrainer._compute_loss, with weights of the sampler where a mode is named."""
    return _computed(name, inputs, INPUTS[inputs], config)


def penalty(name: str, inputs: str, **config: Any) -> dict[str, Any]:
    """The same with advantages of zero and beta 1, so that the KL is all of the loss; uncorrected, unless asked for."""
    alone = {**INPUTS[inputs], "advantages": torch.zeros_like(INPUTS[inputs]["mask"])}
    entry = _computed(name, inputs, alone, {"beta": 1.0, "use_bias_correction_kl": False, **config})
    return {**entry, "config": {**entry["config"], "advantages": "zero"}}


def _computed(name: str, inputs: str, given: Inputs, config: dict[str, Any]) -> dict[str, Any]:
    leaf = given["logprobs"].clone().requires_grad_()
    weighting = {key: value for key, value in config.items() if key.startswith("vllm_")}
    settings = {**DEFAULTS, **{key: value for key, value in config.items() if key not in weighting}}
    rest = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "steps_per_generation": 1}
    trainer = stand_in(
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros_like(leaf), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        top_entropy_quantile=1.0,
        epsilon_low=settings["epsilon"],
        use_vllm=bool(weighting),
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(**rest, **{key: settings[key] for key in ARGUMENTS}),
        _entropy_bonus_enabled=False,
        **{key: value for key, value in settings.items() if key not in (*ARGUMENTS, "epsilon")},
    )
    ones = torch.ones(4, 1, dtype=torch.int64)
    made: dict[str, Any] = {}
    weights = None
    if weighting:
        bounds = {"vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": 3.0}
        weights = sampler_weights(given, {**bounds, **weighting})
        made["weights"] = weights.expand_as(leaf).tolist()
    loss = GRPOTrainer._compute_loss(
        trainer,
        trainer.model,
        {
            "prompt_ids": ones,
            "prompt_mask": ones,
            "completion_ids": torch.ones(4, 7, dtype=torch.int64),
            "completion_mask": given["mask"],
            "advantages": given["advantages"],
            "old_per_token_logps": given.get("old_logprobs"),  # without them the policy is its own anchor
            "sampling_per_token_logps": given.get("rollout_logprobs"),
            "ref_per_token_logps": given["ref_logprobs"],
            "importance_sampling_ratio": weights,
            "num_items_in_batch": given["mask"].sum(),
        },
    )
    part = f"{GRPO}._generate_and_score_completions (its weights) + " if weighting else ""
    return {
        "name": name,
        "function": f"{part}{GRPO}._compute_loss",
        "config": {**settings, **weighting},
        "inputs": inputs,
        **answer(loss, leaf),
        **made,
    }
