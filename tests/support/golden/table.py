"""Which of our losses each golden value of a peer's own code (`tests/golden`) belongs to; run it to print the documented table.

Every entry of every peer is in exactly one of three tables: `HELD` (one of our losses gives the same value and gradient),
`DIFFERS` (ours is another number on purpose) and `NOT_YET` (no loss of ours computes it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from golden.case import ALL_ROWS, FP32, Case
from golden.penalties import skyrl_penalties, skyrl_two_means, verl_penalties
from golden.pending import NOT_RECORDED, NOT_YET
from golden.policies import REJECTED, rejected, skyrl_policies, trl_policies, verl_policies

from pullback.losses import (
    DPO,
    GRPO,
    KL,
    KTO,
    PPO,
    Aggregation,
    ClipRange,
    CrossEntropy,
    ImportanceSampling,
    Loss,
    fixed_length,
    preset,
)
from pullback.losses.functional.kl import KLEstimator
from pullback.losses.parts.kl import KLGradient

__all__ = ["DIFFERS", "ENTRIES", "HELD", "NOT_YET", "PEERS", "Case", "documented_table", "inputs_of"]

FOLDER: Final = Path(__file__).parents[2] / "golden"
PEERS: Final = {
    peer: json.loads((FOLDER / f"{peer}.json").read_text()) for peer in ("verl", "trl", "skyrl", "cookbook")
}
ENTRIES: Final[dict[str, dict[str, Any]]] = {
    f"{peer}:{entry['name']}": entry for peer, document in PEERS.items() for entry in document["entries"]
}


def inputs_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of an entry by our names; nested lists [B, T]."""
    inputs: dict[str, Any] = PEERS[entry["peer"]]["inputs"][entry["inputs"]]
    return inputs


def _ppo(aggregation: str | Aggregation, family: str = "PPO clip", **options: Any) -> Case:
    band = ClipRange.from_epsilon(0.2, 0.28)
    return Case(PPO(band, aggregation), family, PPO(0.05, aggregation), **options)


def _kl(
    estimator: KLEstimator, gradient: KLGradient, aggregation: str, control: KLGradient | None = None, **options: Any
) -> Case:
    def penalty(beta: float, gradient: KLGradient) -> Loss:
        kl = KL(estimator, beta, gradient, importance=False, acknowledge_biased=True)
        return GRPO(None, kl, "none", aggregation)

    family = "KL, straight-through" if gradient == "reverse" else f"KL {estimator}"
    wrong = penalty(2.0, gradient) if control is None else penalty(1.0, control)
    return Case(penalty(1.0, gradient), family, wrong, only_kl=True, **options)


def _verl() -> dict[str, Case]:
    modes: dict[str, tuple[str | Aggregation, float]] = {
        "token-mean": ("token_mean", 1e-12),
        "token-sum": ("sum", 1e-12),
        "seq-mean-token-sum": ("sequence_mean_token_sum", 1e-12),
        "seq-mean-token-mean": ("sequence_mean_token_mean", 1e-7),  # verl adds 1e-8 to each length
        "seq-mean-token-sum-norm": (fixed_length(7), 1e-12),  # the padded width, where no factor is given
    }
    cases = {
        f"ppo-{inputs}-{mode}": _ppo(aggregation, tolerance=tolerance)
        for inputs in ("tokens", "rows")
        for mode, (aggregation, tolerance) in modes.items()
    }
    cases["ppo-tokens-norm-16"] = _ppo(fixed_length(16))
    reinforce = GRPO(None, None, "none", "token_mean")
    cases["reinforce"] = Case(reinforce, "REINFORCE", ImportanceSampling("token_mean"))
    estimators: tuple[KLEstimator, ...] = ("k1", "abs", "k2", "k3")
    for estimator in estimators:
        cases[f"kl-{estimator}"] = _kl(estimator, "pathwise", "token_mean")
        if estimator != "k2":
            cases[f"kl-{estimator}+"] = _kl(estimator, "reverse", "token_mean", control="pathwise")
    cases["kl-k2-far"] = _kl("k2", "pathwise", "token_mean")
    cases["kl-k3-seq-mean-token-mean"] = _kl("k3", "pathwise", "sequence_mean_token_mean", tolerance=1e-7)
    return cases | _supervised("tokens", "rows", "padded") | verl_policies() | verl_penalties()


def _supervised(*names: str) -> dict[str, Case]:
    """Cross-entropy over the trained tokens; the peers' trainers divide, the protocol's loss is a sum."""
    mean, rows = CrossEntropy("token_mean"), CrossEntropy("sequence_mean_token_mean")
    return {f"cross_entropy-{name}": Case(mean, "cross-entropy", rows) for name in names}


def _skyrl() -> dict[str, Case]:
    mean, sampler, prompts = "sequence_mean_token_mean", "rollout_logprobs", (0, 0, 1, 1)
    rows = preset("skyrl:regular", eps_clip_high=0.28, loss_reduction="sequence_mean")
    cases = {
        "ppo-tokens-token_mean": _ppo("token_mean", tolerance=FP32),
        "ppo-tokens-sequence_mean": _ppo(mean, tolerance=FP32),
        "ppo-tokens-seq_mean_token_sum_norm": _ppo(fixed_length(16), tolerance=FP32),
        "ppo-tokens-prompt_mean": _ppo("group_mean_token_mean", tolerance=FP32, groups=prompts),
        "ppo-rows-token_mean": _ppo("token_mean", tolerance=FP32),
        "ppo-rows-sequence_mean": Case(rows, "PPO clip", _ppo(mean).control, FP32),
        "ppo-rows-seq_mean_token_sum_norm": _ppo(fixed_length(16), tolerance=FP32, counts=ALL_ROWS),
        "ppo-rows-prompt_mean": _ppo("group_mean_token_mean", tolerance=FP32, groups=prompts),
        "cross_entropy": Case(CrossEntropy(), "cross-entropy", CrossEntropy("token_mean")),
        "importance_sampling": Case(ImportanceSampling(), "importance sampling", PPO()),
        "server-cross_entropy": Case(CrossEntropy(), "cross-entropy", CrossEntropy("token_mean")),
        "server-importance_sampling": Case(ImportanceSampling(), "importance sampling", PPO(), anchor=sampler),
        "server-ppo": _ppo("sum", anchor=sampler),
        "kl-k3-rows": _kl("k3", "pathwise", mean, counts=ALL_ROWS),
    }
    estimators: tuple[KLEstimator, ...] = ("k1", "abs", "k2", "k3")
    kl = {f"kl-{estimator}": _kl(estimator, "pathwise", mean) for estimator in estimators}
    return {**cases, **kl, **skyrl_policies(), **skyrl_penalties()}


def _trl() -> dict[str, Case]:
    cases = {
        name: _trl_grpo(entry)
        for name, entry in ((e["name"], e) for e in PEERS["trl"]["entries"])
        if name.split("-")[0] in ("grpo", "dapo", "bnpo", "dr_grpo")
    }
    for beta in (0.05, 0.1, 0.5):
        cases[f"dpo-sigmoid-{beta:g}"] = Case(preset("trl:dpo", beta=beta), "DPO", DPO(2 * beta))
    for beta in (0.1, 0.5):
        wrong = preset("trl:orpo", beta=3 * beta)
        cases[f"orpo-{beta:g}"] = Case(preset("trl:orpo", beta=beta), "ORPO", wrong, tolerance=FP32)
    corrected = GRPO(None, KL("k3", 1.0, importance="anchor", acknowledge_biased=True), "none", "token_mean")
    plain = _kl("k3", "pathwise", "token_mean")
    cases |= {
        "kl-k3": plain,
        "kl-k3-rows": _kl("k3", "pathwise", "sequence_mean_token_mean", counts=ALL_ROWS),
        "kl-k3-corrected": Case(corrected, "KL k3", plain.loss, only_kl=True),
        "kl-k3-far": plain,  # which TRL does not clamp
    }
    wrong = ImportanceSampling("token_mean")
    counted = Case(CrossEntropy("token_mean"), "cross-entropy", wrong, counts={"tokens": 40.0})
    cases |= {**_supervised("tokens", "rows"), "cross_entropy-counted": counted}
    return cases | _trl_labels() | trl_policies()


def _trl_labels() -> dict[str, Case]:
    weighted = preset("trl:kto", beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)
    zero = preset("trl:apo_zero_unpaired", beta=0.3)
    return {
        "kto": Case(preset("trl:kto"), "KTO", KTO(0.2)),
        "kto-weights": Case(weighted, "KTO", KTO(0.5)),
        "kto-negative": Case(preset("trl:kto", beta=0.3), "KTO", KTO(0.3, 0.5)),
        "kto-desirable": Case(preset("trl:kto"), "KTO", preset("trl:apo_zero_unpaired", beta=0.2)),
        "apo_zero_unpaired": Case(zero, "APO-zero, unpaired", KTO(0.3)),
    }


def _trl_grpo(entry: Mapping[str, Any]) -> Case:
    config = entry["config"]
    kind, corrected = config["loss_type"], config["use_bias_correction_kl"]
    length = {"max_completion_length": 16} if kind == "dr_grpo" else {}
    options = {"beta": config["beta"], "epsilon_high": config["epsilon_high"], "use_bias_correction_kl": corrected}
    changed = {"use_bias_correction_kl": not corrected} if config["beta"] else {"epsilon": 0.05, "epsilon_high": 0.05}
    return Case(
        preset(f"trl:{kind}", **options, **length),
        "GRPO with KL" if config["beta"] else "PPO clip",
        preset(f"trl:{kind}", **{**options, **changed}, **length),
    )


def _cookbook() -> dict[str, Case]:
    return {f"dpo-{beta:g}": Case(DPO(beta), "DPO", DPO(2 * beta)) for beta in (0.05, 0.1, 0.5)}


HELD: Final[dict[str, Case]] = {
    f"{peer}:{name}": case
    for peer, cases in (("verl", _verl()), ("trl", _trl()), ("skyrl", _skyrl()), ("cookbook", _cookbook()))
    for name, case in cases.items()
}

# Ours on the same inputs, and why it is another number.
_CLAMPED: Final = "k3 is clamped to 10, so its gradient is zero once the reference is 14 times likelier; ours is not"
DIFFERS: Final[dict[str, tuple[Case, str]]] = {
    "verl:kl-k3-far": (_kl("k3", "pathwise", "token_mean"), _CLAMPED),
    "verl:kl-k3+-far": (
        _kl("k3", "reverse", "token_mean"),
        "the reported value is clamped to 10; the gradient is ours",
    ),
    "skyrl:kl-k3-far": (_kl("k3", "pathwise", "sequence_mean_token_mean"), _CLAMPED),
    "skyrl:ppo_kl-token_mean": (
        skyrl_two_means()[0],
        "its KL is a mean within and over sequences, whatever the reduction; ours has the loss's own",
    ),
    **{
        f"verl:{entry['name']}": (
            Case(rejected(entry["config"]), "rejection by a statistic", PPO()),
            "divides by the tokens that are kept; ours by all, so that a filter does not change the step size of the rest",
        )
        for entry in PEERS["verl"]["entries"]
        if entry["name"].startswith(REJECTED)
    },
}


def documented_table() -> str:
    """Return the table of `docs/losses.md`: what is held to which peer's code, in Markdown."""
    cells: dict[str, dict[str, list[str]]] = {}
    groups = [
        *((case.family, "equal", key) for key, case in HELD.items()),
        *((case.family, "differ", key) for key, (case, _) in DIFFERS.items()),
        *((family, "recorded only", key) for family, keys in NOT_YET.items() for key in keys),
    ]
    for family, state, key in groups:
        cells.setdefault(family, {}).setdefault(key.split(":")[0], []).append(state)
    heads = [f"{peer} {document['version']}" for peer, document in PEERS.items()]
    lines = ["| loss | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for family in sorted(cells, key=str.lower):
        lines.append(f"| {family} | " + " | ".join(_cell(family, peer, cells[family]) for peer in PEERS) + " |")
    return "\n".join(lines)


def _cell(family: str, peer: str, row: Mapping[str, list[str]]) -> str:
    if peer not in row:
        return "not recorded" if (family, peer) in NOT_RECORDED else "no peer code"
    counts = [(row[peer].count(state), state) for state in ("equal", "differ", "recorded only")]
    return ", ".join(f"{count} {state}" for count, state in counts if count)


if __name__ == "__main__":
    print(documented_table())
