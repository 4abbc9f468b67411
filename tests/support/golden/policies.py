"""The golden values of policy losses beyond PPO: ratios of sequences, clipped weights, and corrections for the sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from golden.case import FP32, Case

from pullback.losses import CISPO, DRO, GRPO, GSPO, PPO, ClipRange, Correction, Loss, Rejection, SimPO, preset
from pullback.losses.parts.correction import Level
from pullback.losses.parts.rejection import RejectionLevel, Statistic

__all__ = ["REJECTED", "rejected", "skyrl_policies", "trl_policies", "verl_policies"]

MEAN: Final = "sequence_mean_token_mean"
SAMPLER: Final = "rollout_logprobs"
INPUTS: Final = ("tokens", "rows")
_HIGHER: Final = ClipRange.from_epsilon(0.2, 0.28)


def corrected(correction: Correction | None) -> Loss:
    """The loss that the peers' corrections were recorded with."""
    return GRPO(_HIGHER, correction=correction)


def both(prefix: str, family: str, loss: Loss, tolerance: float = 1e-12) -> dict[str, Case]:
    """One correction on both inputs; the control is the loss without it."""
    return {f"{prefix}-{inputs}": Case(loss, family, corrected(None), tolerance) for inputs in INPUTS}


_TIS: Final = {"token": "truncated weights, token", "sequence": "truncated weights, sequence product"}
_MIS: Final = {"token": "masked weights, token (IcePop)", "sequence": "masked weights, sequence product"}


def verl_policies() -> dict[str, Case]:
    """Of verl 0.9, mostly by its presets."""

    def vanilla(**options: Any) -> Loss:
        higher = {"clip_ratio_high": 0.28, "clip_ratio_c": 1e6}
        return preset("verl:vanilla", **{**higher, **options})

    dual = "dual clip"
    cases = {
        "dual_clip-tokens": Case(preset("verl:vanilla"), dual, preset("verl:vanilla", clip_ratio_c=1e6)),
        "dual_clip-rows-1.5": Case(preset("verl:vanilla", clip_ratio_c=1.5), dual, preset("verl:vanilla")),
        "cispo-default": Case(preset("verl:cispo"), "CISPO", preset("verl:cispo", clip_ratio_low=1.0)),
        "cispo-0_5": Case(CISPO(aggregation="token_mean"), "CISPO", preset("verl:cispo")),
        "dro": Case(preset("verl:dro", dro_beta=0.05), "DRO", DRO(0.5, "token_mean")),
        "bypass-reinforce-token": Case(
            preset("verl:bypass_reinforce"),
            "sampler as anchor, weight of the current policy",
            CISPO(aggregation="token_mean"),
            anchor=SAMPLER,
        ),
    }
    for mode, low, high in (
        (mode, low, high) for mode in ("seq-mean-token-mean", "token-mean") for low, high in ((0.2, 0.28), (3e-4, 4e-4))
    ):
        wide = {"clip_ratio_low": low, "clip_ratio_high": high, "loss_agg_mode": mode}
        control = PPO(0.2, MEAN if mode.startswith("seq") else "token_mean")
        cases[f"gspo_token-{mode}-{low:g}"] = Case(preset("verl:gspo", **wide), "GSPO, token form", control, 1e-7)
    tokens = preset("verl:gspo", clip_ratio_high=0.6)
    cases["gspo_token-token_advantages"] = Case(tokens, "GSPO, token form", PPO(0.2, MEAN), 1e-7)
    bounds = {"tis-token": 1.5, "tis-sequence": 2.0, "icepop-token": "0.7_1.4", "icepop-sequence": "0.5_5.0"}
    for name, bound in bounds.items():
        kind, level = name.split("-")
        loss = vanilla(rollout_is=level, rollout_is_threshold=bound)
        cases |= both(name, (_TIS if kind == "tis" else _MIS)[level], loss)
    for level, bound in (("token", 1.5), ("sequence", 2.0)):
        loss = vanilla(rollout_is=level, rollout_is_threshold=bound, rollout_is_batch_normalize=True)
        # verl adds 1e-8 to the count that the mean weight is divided by
        cases |= both(f"self_normalised-{level}", "self-normalised weights", loss, 1e-7)
    return cases


def trl_policies() -> dict[str, Case]:
    """Of TRL 1.16, mostly by its presets."""

    def vllm(mode: str, high: float = 3.0, low: float | None = None, **options: Any) -> Loss:
        clip = {"vllm_importance_sampling_clip_max": high, "vllm_importance_sampling_clip_min": low}
        chosen = {"epsilon_high": 0.28, **options}
        return preset("trl:dapo", use_vllm=True, vllm_importance_sampling_mode=mode, **clip, **chosen)

    plain = preset("trl:dapo")
    sequence, form, wrong = preset("trl:gspo"), "GSPO, sequence form", PPO(0.2, MEAN)
    narrow = preset("trl:gspo", epsilon=0.0003, epsilon_high=0.0004)
    cases = {
        "delta-3": Case(preset("trl:dapo", delta=3.0), "dual clip", plain),
        "cispo-5": Case(preset("trl:cispo"), "CISPO", preset("trl:cispo", epsilon_high=1.1)),
        "cispo-2": Case(preset("trl:cispo", epsilon_high=2.0), "CISPO", preset("trl:cispo", epsilon_high=1.1)),
        "gspo_sequence": Case(preset("trl:gspo", epsilon_high=0.28), form, wrong),
        "gspo_sequence-paper": Case(narrow, form, wrong),
        "gspo_sequence-masked_row": Case(sequence, form, wrong),
        # n times the loss of each sequence, over all tokens: what the token form sums up to
        "gspo_sequence-dapo": Case(GSPO(0.2, "token_mean"), form, GSPO(0.2, MEAN)),
        "luspo": Case(preset("trl:luspo"), "LUSPO", GSPO(0.2, MEAN)),
        "tis-token-kl": Case(
            vllm("token_truncate", 1.5, epsilon_high=0.2, beta=0.04),
            "truncated weights with KL",
            preset("trl:dapo", beta=0.04),
        ),
        "simpo": Case(preset("trl:simpo", beta=2.0, simpo_gamma=1.0), "SimPO", SimPO(2.0, 0.0), tolerance=FP32),
    }
    return {
        **cases,
        **both("tis-token", _TIS["token"], vllm("token_truncate", 1.5)),
        **both("tis-token-both", "truncated weights, token, from below too", vllm("token_truncate", 1.4, 0.7)),
        **both("tis-sequence", _TIS["sequence"], vllm("sequence_truncate", 2.0)),
        **both("mis-token", _MIS["token"], vllm("token_mask", 1.4, 0.7)),
        **both("mis-sequence", _MIS["sequence"], vllm("sequence_mask")),
        **both("mis-sequence-both", _MIS["sequence"], vllm("sequence_mask", 1.4, 0.7)),
    }


def skyrl_policies() -> dict[str, Case]:
    """Of SkyRL 0.4; its exponentials are taken in fp32."""
    narrow, filters = CISPO(ClipRange(0.8, 1.2), "token_mean"), "rejection by a statistic"
    server = CISPO(ClipRange(0.8, 1.2))
    cases = {
        "dual_clip": Case(preset("skyrl:dual_clip"), "dual clip", preset("skyrl:regular")),
        "cispo": Case(preset("skyrl:cispo"), "CISPO", narrow),
        "cispo-rollout": Case(narrow, "CISPO", preset("skyrl:cispo"), anchor=SAMPLER),
        "server-cispo": Case(server, "CISPO", CISPO(), anchor=SAMPLER),
        "server-cispo-0_5": Case(CISPO(), "CISPO", server, anchor=SAMPLER),
    }
    cases = {name: Case(**{**vars(case), "tolerance": FP32}) for name, case in cases.items()}
    for name, high, low in (("", 0.28, 0.2), ("-paper", 4e-4, 3e-4), ("-token_advantages", 0.6, 0.2)):
        loss = preset("skyrl:gspo", eps_clip_low=low, eps_clip_high=high)
        cases[f"gspo_token{name}"] = Case(loss, "GSPO, token form", PPO(0.2, MEAN), FP32)

    def truncated(kind: str, high: float) -> Loss:
        return preset("skyrl:regular", eps_clip_high=0.28, tis_ratio_type=kind, **{f"{kind}_tis_ratio_clip_high": high})

    filtered = {
        "token": Rejection("ratio", "token", 0.7, 1.4),
        "geometric": Rejection("ratio", "mean", 0.99, 1.01),
        "product": Rejection("ratio", "sum", 0.5, 2.0),
        "outlier": Rejection("ratio", "worst", 0.4, 1.8),
    }
    for name, each in filtered.items():
        cases |= both(f"mask-{name}", filters, corrected(Correction.rejection(each)), FP32)
    masked = corrected(Correction.masked(0.7, 1.4))
    return {
        **cases,
        **both("tis-token", _TIS["token"], truncated("token", 1.5), FP32),
        **both("tis-sequence", _TIS["sequence"], truncated("sequence", 2.0), FP32),
        **both("masked_importance_sampling-token", _MIS["token"], masked, FP32),
    }


_LEVELS: Final[dict[str, RejectionLevel]] = {"token": "token", "seq_sum": "sum", "seq_mean": "mean", "seq_max": "worst"}
_STATISTICS: Final[dict[str, Statistic]] = {"k1": "ratio", "k2": "k2", "k3": "k3"}


def _rejection(name: str, threshold: str) -> Rejection:
    """verl's bounds of k1 are on sampler / old, the inverse of our ratio."""
    level, statistic = name.rsplit("_", 1)
    low, high = 0.0, math.inf
    if statistic == "k1":
        low, high = (1 / float(x) for x in reversed(threshold.split("_")))
    else:
        high = float(threshold)
    return Rejection(_STATISTICS[statistic], _LEVELS[level], low, high)


def rejected(config: Mapping[str, Any]) -> Loss:
    """Our loss with the filters of a configuration of verl's, whose mean is over all tokens."""
    pairs = zip(config["rollout_rs"].split(","), config["rollout_rs_threshold"].split(","), strict=True)
    filters = tuple(_rejection(*pair) for pair in pairs)
    if "rollout_is" not in config:
        return corrected(Correction.rejection(*filters))
    # Its one filter is on the product, and never lets the truncation bind; so it is a mask.
    level: Level = config["rollout_is"]
    assert filters[0].level == "sum"
    assert filters[0].high <= config["rollout_is_threshold"]
    return corrected(Correction.masked(filters[0].low, filters[0].high, level=level))


REJECTED: Final = ("rejection-", "tis-sequence-rejection")
