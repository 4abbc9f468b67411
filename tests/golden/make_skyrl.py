"""Record what SkyRL's own loss code answers on the shared inputs.

Run in an environment of its own:  pip install torch==2.13.0 numpy jax jaxtyping loguru omegaconf pydantic transformers
                                   cloudpickle datasets,
                                   then pip install --no-deps --ignore-requires-python skyrl==0.4.0
then:                              python tests/golden/make_skyrl.py > tests/golden/skyrl.json

The functions are called as they are. Inputs are fp64, but SkyRL takes exp in fp32. Its losses are sums; the reduction is
scaled into the advantages first, as its trainer does. The functions of its Tinker server are in jax, here with fp64.
ray, cloudpathlib and skyrl_gym, which the modules import beside the losses, are stood in for.
"""

from __future__ import annotations

import typing
from importlib.metadata import version
from typing import Any

import jax
import typing_extensions
from recording import answer, golden_inputs, stand_in_for, write

typing.TypedDict = typing_extensions.TypedDict  # what pydantic asks of Python 3.11; SkyRL is written for 3.12
stand_in_for("ray", "cloudpathlib", "skyrl_gym")
jax.config.update("jax_enable_x64", True)

from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: E402
from skyrl.backends.skyrl_train.utils.torch_utils import masked_mean  # noqa: E402
from skyrl.tinker import loss_fns  # noqa: E402
from skyrl.train.config import config as skyrl_config  # noqa: E402
from skyrl_worker import worker_entries  # noqa: E402

INPUTS = golden_inputs()
UTILS, SERVER = "skyrl.backends.skyrl_train.utils.ppo_utils", "skyrl.tinker.loss_fns"
REDUCTIONS = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean")
PROMPTS = [(0, 2), (2, 4)]
NESTED = {
    "off_policy_correction": skyrl_config.OffPolicyCorrectionConfig,
    "cispo": skyrl_config.CISPOConfig,
    "dppo": skyrl_config.DPPOConfig,
    "sapo": skyrl_config.SAPOConfig,
}
CLIP_HIGHER = {"policy_loss_type": "regular", "eps_clip_low": 0.2, "eps_clip_high": 0.28}


def algorithm(config: dict[str, Any]) -> skyrl_config.AlgorithmConfig:
    """The algorithm's configuration; nested parts are given as their fields."""
    parts = {key: NESTED[key](**value) if key in NESTED else value for key, value in config.items()}
    return skyrl_config.AlgorithmConfig(**parts)


def policy(name: str, function: Any, inputs: str, config: dict[str, Any]) -> dict[str, Any]:
    """A policy loss on advantages that carry the reduction, or a sum where none is named."""
    given = INPUTS[inputs]
    leaf = given["logprobs"].clone().requires_grad_()
    advantages = given["advantages"]
    reduction = config.get("loss_reduction")
    if reduction is not None:
        advantages = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
            advantages, given["mask"], reduction, 4, config.get("max_seq_len", 16), PROMPTS
        )
    loss, _ = function(
        leaf,
        given["old_logprobs"],
        advantages,
        algorithm(config),
        given["mask"],
        given["rollout_logprobs"],
    )
    scaled = "" if reduction is None else f"{UTILS}.apply_loss_reduction_to_advantages_minibatch + "
    settings = {**config, "prompt_boundaries": PROMPTS} if reduction == "prompt_mean" else config
    return {
        "name": name,
        "function": f"{scaled}{UTILS}.{function.__name__}",
        "config": settings,
        "inputs": inputs,
        **answer(loss, leaf),
    }


def kl(name: str, kind: str, inputs: str) -> dict[str, Any]:
    """A KL penalty, averaged within and over sequences as the worker does."""
    given = INPUTS[inputs]
    leaf = given["logprobs"].clone().requires_grad_()
    values = ppo_utils.compute_approx_kl(leaf, given["ref_logprobs"], given["mask"], kind)
    loss = masked_mean(values, given["mask"], dim=-1).mean()
    return {
        "name": name,
        "function": f"{UTILS}.compute_approx_kl",
        "config": {"kl_estimator_type": kind, "reduction": "masked_mean(dim=-1).mean()"},
        "inputs": inputs,
        **answer(loss, leaf),
    }


def served(name: str, kind: str, low: float, high: float) -> dict[str, Any]:
    """A loss of the Tinker server, summed as it does."""
    given = INPUTS["tokens"]
    arrays = {key: jax.numpy.asarray(value.numpy()) for key, value in given.items()}
    bounds = loss_fns.LossFnConfig(jax.numpy.asarray(low), jax.numpy.asarray(high))
    function = loss_fns.LOSS_FUNCTION_MAP[kind]

    def total(logprobs: jax.Array) -> jax.Array:
        return function(logprobs, arrays["mask"], arrays["rollout_logprobs"], arrays["advantages"], bounds).sum()

    loss, gradient = jax.value_and_grad(total)(arrays["logprobs"])
    return {
        "name": name,
        "function": f"{SERVER}.{function.__name__}",
        "config": {"clip_low_threshold": low, "clip_high_threshold": high},
        "inputs": "tokens",
        "loss": float(loss),
        "gradient": gradient.tolist(),
    }


def loss_entries() -> list[dict[str, Any]]:
    """Policy losses, and what their sum is divided by."""
    entries = [
        policy(
            f"ppo-{inputs}-{reduction}", ppo_utils.ppo_policy_loss, inputs, {**CLIP_HIGHER, "loss_reduction": reduction}
        )
        for inputs in ("tokens", "rows")
        for reduction in REDUCTIONS
    ]
    dual = {"policy_loss_type": "dual_clip", "loss_reduction": "token_mean"}
    rollout_is = {
        "policy_loss_type": "rollout_is",
        "loss_reduction": "token_mean",
        "eps_clip_low": 0.5,
        "eps_clip_high": 4.0,
    }
    mean = {"loss_reduction": "sequence_mean"}
    return [
        *entries,
        policy("dual_clip", ppo_utils.ppo_policy_loss, "tokens", {**dual, "clip_ratio_c": 3.0}),
        policy("gspo_token", ppo_utils.gspo_policy_loss, "rows", {**mean, "eps_clip_high": 0.28}),
        policy(
            "gspo_token-paper",
            ppo_utils.gspo_policy_loss,
            "rows",
            {**mean, "eps_clip_low": 3e-4, "eps_clip_high": 4e-4},
        ),
        policy("gspo_token-token_advantages", ppo_utils.gspo_policy_loss, "tokens", {**mean, "eps_clip_high": 0.6}),
        policy("cispo", ppo_utils.compute_policy_loss_cispo, "tokens", {"loss_reduction": "token_mean"}),
        policy(
            "cispo-rollout",
            ppo_utils.compute_policy_loss_cispo,
            "tokens",
            {
                "loss_reduction": "token_mean",
                "cispo": {"cispo_anchor": "rollout", "cispo_eps_clip_low": 0.2, "cispo_eps_clip_high": 0.2},
            },
        ),
        policy("rollout_is", ppo_utils.rollout_is_policy_loss, "tokens", rollout_is),
        policy("sapo", ppo_utils.sapo_policy_loss, "tokens", mean),
        policy("dppo_tv", ppo_utils.dppo_policy_loss, "tokens", {"dppo": {"delta_low": 0.025, "delta_high": 0.02}}),
        policy(
            "dppo_kl",
            ppo_utils.dppo_policy_loss,
            "tokens",
            {"dppo": {"dppo_type": "binary_kl", "delta_low": 0.01, "delta_high": 0.0039}},
        ),
        policy("cross_entropy", ppo_utils.cross_entropy_loss, "tokens", {}),
        policy("importance_sampling", ppo_utils.importance_sampling_loss, "tokens", {}),
    ]


def correction_entries() -> list[dict[str, Any]]:
    """Off-policy corrections of PPO."""
    token = {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.5}
    band = {"token_mask_is_threshold_low": 0.7, "token_mask_is_threshold_high": 1.4}
    table: dict[str, dict[str, Any]] = {
        "tis-token": token,
        "tis-sequence": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 2.0},
        "mask-token": band,
        "masked_importance_sampling-token": {**token, "token_tis_ratio_clip_high": 100.0, **band},
        "mask-geometric": {"sequence_mask_metric": "geometric"},
        "mask-product": {"sequence_mask_metric": "product", "product_mask_high": 2.0, "product_mask_low": 0.5},
        "mask-outlier": {"outlier_token_is_threshold_low": 0.4, "outlier_token_is_threshold_high": 1.8},
        "tis-sequence-after-mask-token": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 5.0, **band},
    }
    base = {**CLIP_HIGHER, "loss_reduction": "token_mean"}
    return [
        policy(f"{name}-{inputs}", ppo_utils.ppo_policy_loss, inputs, {**base, "off_policy_correction": correction})
        for name, correction in table.items()
        for inputs in ("tokens", "rows")
    ]


def other_entries() -> list[dict[str, Any]]:
    """KL penalties and the Tinker server."""
    return [
        *(kl(f"kl-{kind}", kind, "tokens") for kind in ("k1", "abs", "k2", "k3")),
        kl("kl-k3-rows", "k3", "rows"),
        kl("kl-k3-far", "k3", "far"),
        served("server-cross_entropy", "cross_entropy", 0.8, 1.2),
        served("server-importance_sampling", "importance_sampling", 0.8, 1.2),
        served("server-ppo", "ppo", 0.8, 1.28),
        served("server-cispo", "cispo", 0.8, 1.2),
        served("server-cispo-0_5", "cispo", 0.0, 5.0),
    ]


entries = loss_entries() + correction_entries() + other_entries() + worker_entries(INPUTS)
write("skyrl", version("skyrl"), INPUTS, entries)
