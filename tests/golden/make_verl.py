"""Record what verl's own loss code answers on the shared inputs.

Run in an environment of its own:  pip install torch==2.13.0 numpy omegaconf pandas tensordict transformers,
                                   then pip install --no-deps verl==0.9.1
then:                              python tests/golden/make_verl.py > tests/golden/verl.json

verl's functions are called as they are, in fp64; ray, two loggers, PIL and datasets, which its modules import, are stood
in for. A rollout correction is what the trainer makes of it: weights and mask from `rollout_corr_helper` on old and sampler
log-probs, then the loss with both, or `bypass_mode` with the sampler as the anchor.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from recording import answer, golden_inputs, stand_in_for, write
from torch import Tensor

stand_in_for("ray", "codetiming", "orjson", "PIL", "datasets")

from verl.trainer.config.algorithm import RolloutCorrectionConfig  # noqa: E402
from verl.trainer.ppo import core_algos, rollout_corr_helper  # noqa: E402
from verl.workers.config.actor import ActorConfig, PolicyLossConfig  # noqa: E402
from verl_worker import worker_entries  # noqa: E402

INPUTS = golden_inputs()
ALGOS, HELPER = "verl.trainer.ppo.core_algos", "verl.trainer.ppo.rollout_corr_helper"
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
NO_DUAL_CLIP = 1e6  # verl has no way to turn dual clipping off but a bound that no ratio reaches
CLIP_HIGHER = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": NO_DUAL_CLIP}


def actor(config: dict[str, Any]) -> ActorConfig:
    """The actor's configuration; ``policy_loss`` holds the fields of its own dataclass."""
    fields = {k: v for k, v in config.items() if k not in ("loss_agg_mode", "policy_loss", "loss_scale_factor")}
    own = dict(config.get("policy_loss", {}))
    if "rollout_correction" in own:
        own["rollout_correction"] = RolloutCorrectionConfig(**own["rollout_correction"])
    info = {"loss_scale_factor": config["loss_scale_factor"]} if "loss_scale_factor" in config else {}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(**own),
        global_batch_info=info,
        **fields,
    )


def policy(name: str, mode: str, inputs: str, config: dict[str, Any], anchor: str = "old_logprobs") -> dict[str, Any]:
    """A registered policy loss of verl."""
    given = INPUTS[inputs]
    leaf = given["logprobs"].clone().requires_grad_()
    function = core_algos.get_policy_loss_fn(mode)
    settings = {"loss_agg_mode": "token-mean", **config}
    loss, _ = function(
        old_log_prob=given[anchor],
        log_prob=leaf,
        advantages=given["advantages"],
        response_mask=given["mask"],
        loss_agg_mode=settings["loss_agg_mode"],
        config=actor(settings),
    )
    return {
        "name": name,
        "function": f"{ALGOS}.{function.__name__}",
        "config": {"loss_mode": mode, "anchor": anchor, **settings},
        "inputs": inputs,
        **answer(loss, leaf),
    }


def corrected(name: str, inputs: str, correction: dict[str, Any]) -> dict[str, Any]:
    """Decoupled: weights and mask of old against sampler, then the vanilla loss with its anchor old."""
    given = INPUTS[inputs]
    leaf = given["logprobs"].clone().requires_grad_()
    proto, mask, _ = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        old_log_prob=given["old_logprobs"],
        rollout_log_prob=given["rollout_logprobs"],
        response_mask=given["mask"],
        **correction,
    )
    weights = None if proto is None else proto.batch["rollout_is_weights"]
    loss, _ = core_algos.compute_policy_loss_vanilla(
        old_log_prob=given["old_logprobs"],
        log_prob=leaf,
        advantages=given["advantages"],
        response_mask=mask,
        loss_agg_mode="token-mean",
        config=actor(CLIP_HIGHER),
        rollout_is_weights=weights,
    )
    made: dict[str, Any] = {} if weights is None else {"weights": weights.tolist()}
    return {
        "name": name,
        "function": f"{HELPER}.compute_rollout_correction_and_rejection_mask + {ALGOS}.compute_policy_loss_vanilla",
        "config": {"loss_agg_mode": "token-mean", **CLIP_HIGHER, **correction},
        "inputs": inputs,
        **answer(loss, leaf),
        **made,
        "kept": mask.tolist(),
    }


def kl(name: str, kind: str, mode: str, inputs: str) -> dict[str, Any]:
    """A KL penalty, aggregated as the actor does."""
    given = INPUTS[inputs]
    leaf = given["logprobs"].clone().requires_grad_()
    values: Tensor = core_algos.kl_penalty(leaf, given["ref_logprobs"], kind)
    loss = core_algos.agg_loss(values, given["mask"], mode)
    return {
        "name": name,
        "function": f"{ALGOS}.kl_penalty + {ALGOS}.agg_loss",
        "config": {"kl_penalty": kind, "loss_agg_mode": mode},
        "inputs": inputs,
        **answer(loss, leaf),
    }


def ppo_entries() -> list[dict[str, Any]]:
    """Clipping, dual clipping, every aggregation."""
    entries = [
        policy(f"ppo-{inputs}-{mode}", "vanilla", inputs, {**CLIP_HIGHER, "loss_agg_mode": mode})
        for inputs in ("tokens", "rows")
        for mode in MODES
    ]
    norm = {**CLIP_HIGHER, "loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 16}
    entries.append(policy("ppo-tokens-norm-16", "vanilla", "tokens", norm))
    entries.append(policy("dual_clip-tokens", "vanilla", "tokens", {}))
    entries.append(policy("dual_clip-rows-1.5", "vanilla", "rows", {"clip_ratio_c": 1.5}))
    return entries


def ratio_entries() -> list[dict[str, Any]]:
    """The other policy losses."""
    entries = []
    for mode in ("seq-mean-token-mean", "token-mean"):
        for low, high in ((0.2, 0.28), (3e-4, 4e-4)):
            config = {"clip_ratio_low": low, "clip_ratio_high": high, "loss_agg_mode": mode}
            entries.append(policy(f"gspo_token-{mode}-{low:g}", "gspo", "rows", config))
    per_token = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.6, "loss_agg_mode": "seq-mean-token-mean"}
    entries.append(policy("gspo_token-token_advantages", "gspo", "tokens", per_token))
    entries += [
        policy("reinforce", "gpg", "tokens", {}),
        policy("cispo-default", "cispo", "tokens", {}),
        policy("cispo-0_5", "cispo", "tokens", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
        policy("dro", "dro", "tokens", {"policy_loss": {"dro_beta": 0.05}}),
        policy("sapo", "sapo", "tokens", {"loss_agg_mode": "seq-mean-token-mean"}),
        policy("gmpo", "geo_mean", "tokens", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
        policy("dppo_tv", "dppo_tv", "tokens", {"clip_ratio_low": 0.025, "clip_ratio_high": 0.02}),
        policy("dppo_kl", "dppo_kl", "tokens", {"clip_ratio_low": 0.01, "clip_ratio_high": 0.0039}),
    ]
    return entries


def weight_entries() -> list[dict[str, Any]]:
    """Truncated, masked and self-normalised weights."""
    table: dict[str, dict[str, Any]] = {
        "tis-token": {"rollout_is": "token", "rollout_is_threshold": 1.5},
        "tis-sequence": {"rollout_is": "sequence", "rollout_is_threshold": 2.0},
        "icepop-token": {"rollout_is": "token", "rollout_is_threshold": "0.7_1.4"},
        "icepop-sequence": {"rollout_is": "sequence", "rollout_is_threshold": "0.5_5.0"},
        "self_normalised-token": {
            "rollout_is": "token",
            "rollout_is_threshold": 1.5,
            "rollout_is_batch_normalize": True,
        },
        "self_normalised-sequence": {
            "rollout_is": "sequence",
            "rollout_is_threshold": 2.0,
            "rollout_is_batch_normalize": True,
        },
    }
    return [corrected(f"{name}-{inputs}", inputs, c) for name, c in table.items() for inputs in ("tokens", "rows")]


def rejection_entries() -> list[dict[str, Any]]:
    """Every statistic of `rollout_rs`; the bounds of k1 are on sampler / old."""
    bounds = {
        "token_k1": "0.8_1.6",
        "token_k2": "0.1",
        "token_k3": "0.1",
        "seq_sum_k1": "0.5_2.0",
        "seq_sum_k2": "0.5",
        "seq_sum_k3": "0.443",
        "seq_mean_k1": "0.99_1.4",
        "seq_mean_k2": "0.1",
        "seq_mean_k3": "0.08",
        "seq_max_k2": "0.3",
        "seq_max_k3": "0.25",
    }
    entries = [
        corrected(f"rejection-{kind}", "rows", {"rollout_rs": kind, "rollout_rs_threshold": bound})
        for kind, bound in bounds.items()
    ]
    both = {"rollout_rs": "token_k2,seq_sum_k1", "rollout_rs_threshold": "0.1,0.5_4.0"}
    entries.append(corrected("rejection-token_k2-and-seq_sum_k1", "rows", both))
    sequence = {"rollout_is": "sequence", "rollout_is_threshold": 2.0}
    entries.append(
        corrected(
            "tis-sequence-rejection",
            "rows",
            {**sequence, "rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.5_4.0"},
        )
    )
    return entries


def bypass_entries() -> list[dict[str, Any]]:
    """The sampler is the anchor; the weight is of the current policy over it."""
    corrections: dict[str, dict[str, Any]] = {
        "bypass-reinforce-token": {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 2.0},
        "bypass-reinforce-sequence": {"loss_type": "reinforce", "rollout_is": "sequence", "rollout_is_threshold": 2.0},
        "bypass-ppo-rejection": {
            "loss_type": "ppo_clip",
            "rollout_is": "token",
            "rollout_rs": "token_k3",
            "rollout_rs_threshold": "0.4",
        },
    }
    return [
        policy(
            name,
            "bypass_mode",
            "tokens",
            {**CLIP_HIGHER, "policy_loss": {"rollout_correction": c}},
            "rollout_logprobs",
        )
        for name, c in corrections.items()
    ]


def kl_entries() -> list[dict[str, Any]]:
    """Estimators, the straight-through ones with a plus, and the clamps of k3."""
    kinds = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")
    entries = [kl(f"kl-{kind}", kind, "token-mean", "tokens") for kind in kinds]
    entries.append(kl("kl-k3-seq-mean-token-mean", "k3", "seq-mean-token-mean", "rows"))
    return entries + [kl(f"kl-{kind}-far", kind, "token-mean", "far") for kind in ("k2", "k3", "k3+")]


policies = ppo_entries() + ratio_entries() + weight_entries() + rejection_entries() + bypass_entries()
write("verl", version("verl"), INPUTS, policies + kl_entries() + worker_entries(INPUTS))
