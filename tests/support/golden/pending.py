"""The golden values of peers that no loss of ours computes yet, by what is missing; see `golden.table`."""

from __future__ import annotations

from typing import Final

__all__ = ["NOT_RECORDED", "NOT_YET"]


def _all(peer: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{peer}:{name}" for name in names)


_DPO_KINDS: Final = (
    *("hinge", "ipo", "exo_pair", "nca_pair", "robust", "sppo_hard"),
    *("aot", "apo_zero", "apo_down", "sigmoid_norm", "discopop"),
)
# By what is missing; these are the names of rows of the documented table too.
NOT_YET: Final[dict[str, tuple[str, ...]]] = {
    "ratio capped for both signs": ("trl:delta-1.1",),
    "SAPO": ("verl:sapo", "trl:sapo", "skyrl:sapo"),
    "GMPO": ("verl:gmpo",),
    "DPPO": (*_all("verl", "dppo_tv", "dppo_kl"), *_all("skyrl", "dppo_tv", "dppo_kl")),
    "ratio band as loss (IcePop)": ("skyrl:rollout_is",),
    "rejection by the current policy and the advantage": ("trl:opsm",),
    "product over the tokens that a mask left": _all(
        "skyrl", "tis-sequence-after-mask-token-tokens", "tis-sequence-after-mask-token-rows"
    ),
    "sampler as anchor, weight of the current policy": _all(
        "verl", "bypass-reinforce-sequence", "bypass-ppo-rejection"
    ),
    "DPO's other forms": tuple(f"trl:dpo-{kind}-0.3" for kind in _DPO_KINDS),
    "CPO": _all("trl", "cpo", "cpo-smoothed", "cpo-hinge", "cpo-ipo"),
    "SimPO with an NLL": ("trl:simpo-nll",),
    "AlphaPO": ("trl:alphapo",),
}

# The peer has code of it, which was not called.
NOT_RECORDED: Final[frozenset[tuple[str, str]]] = frozenset({("GMPO", "trl")})
