"""The golden values of peers that no loss of ours computes yet, by what is missing; see `golden_table`."""

from __future__ import annotations

from typing import Final

__all__ = ["NOT_RECORDED", "NOT_YET"]


def _both(peer: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{peer}:{name}-{inputs}" for name in names for inputs in ("tokens", "rows"))


def _all(peer: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{peer}:{name}" for name in names)


_STATISTICS: Final = (
    *("token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3", "token_k2-and-seq_sum_k1"),
)
_DPO_KINDS: Final = (
    *("hinge", "ipo", "exo_pair", "nca_pair", "robust", "sppo_hard"),
    *("aot", "apo_zero", "apo_down", "sigmoid_norm", "discopop"),
)
# By what is missing; these are the names of rows of the documented table too.
NOT_YET: Final[dict[str, tuple[str, ...]]] = {
    "dual clip": (*_all("verl", "dual_clip-tokens", "dual_clip-rows-1.5"), "trl:delta-3", "skyrl:dual_clip"),
    "ratio capped for both signs": ("trl:delta-1.1",),
    "CISPO": (
        *_all("verl", "cispo-default", "cispo-0_5"),
        *_all("trl", "cispo-5", "cispo-2"),
        *_all("skyrl", "cispo", "cispo-rollout", "server-cispo", "server-cispo-0_5"),
    ),
    "GSPO, sequence form": _all(
        "trl", "gspo_sequence", "gspo_sequence-paper", "gspo_sequence-masked_row", "gspo_sequence-dapo"
    ),
    "GSPO, token form": (
        *(
            f"verl:gspo_token-{mode}-{low}"
            for mode in ("seq-mean-token-mean", "token-mean")
            for low in ("0.2", "0.0003")
        ),
        "verl:gspo_token-token_advantages",
        *_all("skyrl", "gspo_token", "gspo_token-paper", "gspo_token-token_advantages"),
    ),
    "DRO": ("verl:dro",),
    "SAPO": ("verl:sapo", "trl:sapo", "skyrl:sapo"),
    "GMPO": ("verl:gmpo",),
    "LUSPO": ("trl:luspo",),
    "DPPO": (*_all("verl", "dppo_tv", "dppo_kl"), *_all("skyrl", "dppo_tv", "dppo_kl")),
    "ratio band as loss (IcePop)": ("skyrl:rollout_is",),
    "truncated weights, token": (*_both("verl", "tis-token"), *_both("trl", "tis-token"), *_both("skyrl", "tis-token")),
    "truncated weights, token, from below too": _both("trl", "tis-token-both"),
    "truncated weights with KL": ("trl:tis-token-kl",),
    "truncated weights, sequence product": (
        *_both("verl", "tis-sequence"),
        *_both("trl", "tis-sequence"),
        *_both("skyrl", "tis-sequence"),
    ),
    "masked weights, token (IcePop)": (
        *_both("verl", "icepop-token"),
        *_both("trl", "mis-token"),
        *_both("skyrl", "masked_importance_sampling-token"),
    ),
    "masked weights, sequence product": (
        *_both("verl", "icepop-sequence"),
        *_both("trl", "mis-sequence", "mis-sequence-both"),
    ),
    "self-normalised weights": _both("verl", "self_normalised-token", "self_normalised-sequence"),
    "rejection by a statistic": (
        *(f"verl:rejection-{statistic}" for statistic in _STATISTICS),
        *_both("skyrl", "mask-token", "mask-geometric", "mask-product", "mask-outlier"),
        "trl:opsm",
    ),
    "rejection and truncated weights": (
        "verl:tis-sequence-rejection",
        *_both("skyrl", "tis-sequence-after-mask-token"),
    ),
    "sampler as anchor, weight of the current policy": _all(
        "verl", "bypass-reinforce-token", "bypass-reinforce-sequence", "bypass-ppo-rejection"
    ),
    "DPO's other forms": tuple(f"trl:dpo-{kind}-0.3" for kind in _DPO_KINDS),
    "CPO": _all("trl", "cpo", "cpo-smoothed", "cpo-hinge", "cpo-ipo"),
    "SimPO": _all("trl", "simpo", "simpo-nll"),
    "AlphaPO": ("trl:alphapo",),
}

# The peer has code of it, which was not called: inside a worker or a larger function, or no loss of its own.
NOT_RECORDED: Final[frozenset[tuple[str, str]]] = frozenset(
    {
        ("GMPO", "trl"),
        ("KL k3", "trl"),
        ("GRPO with KL", "verl"),
        ("GRPO with KL", "skyrl"),
        ("truncated weights with KL", "verl"),
        ("truncated weights with KL", "skyrl"),
        ("rejection and truncated weights", "trl"),
        ("cross-entropy", "verl"),
        ("cross-entropy", "trl"),
        ("cross-entropy", "cookbook"),
    }
)
