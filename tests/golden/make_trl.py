"""Record what TRL's own loss code answers on the shared inputs.

Run in an environment of its own:  pip install torch==2.13.0, then pip install trl==1.16.0 transformers peft
then:                              python tests/golden/make_trl.py > tests/golden/trl.json

The trainers' methods are called as they are, on a stand-in for the trainer; only the forward pass is replaced, by one that
returns prepared log-probs, so that the gradient with respect to them is TRL's own. All numbers are fp64, but TRL's ORPO
casts to fp32.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import trl
from recording import answer, golden_inputs, write
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl_grpo import grpo, penalty
from trl_labels import label_entries
from trl_sft import supervised_entries
from trl_trainer import stand_in

INPUTS = golden_inputs()


def dpo(kind: str, beta: float, **config: Any) -> dict[str, Any]:
    """DPOTrainer._compute_loss; rows are chosen, then rejected."""
    given = INPUTS["pairs"]
    leaf, mask = given["logprobs"].clone().requires_grad_(), given["mask"]
    sums = (given["ref_logprobs"] * mask).sum(1)
    nothing = torch.zeros(4, 7)  # for metrics that are not recorded here
    outputs = SimpleNamespace(log_probs=leaf * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    model = MagicMock(return_value=outputs)
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        label_smoothing=config.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=config.get("discopop_tau", 0.05)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(4, 8, dtype=torch.int64),
        "attention_mask": torch.ones(4, 8, dtype=torch.int64),
        "completion_mask": torch.cat([torch.zeros(4, 1), mask], 1),
        "ref_chosen_logps": sums[:2],
        "ref_rejected_logps": sums[2:],
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return {
        "name": f"dpo-{kind}-{beta:g}",
        "function": "trl.trainer.dpo_trainer.DPOTrainer._compute_loss",
        "config": {"loss_type": kind, "beta": beta, **config},
        "inputs": "pairs",
        **answer(loss, leaf),
    }


def without_reference(trainer_class: Any, method: str, name: str, mean: bool, **config: Any) -> dict[str, Any]:
    """ORPO or CPO; the NLL is taken over the chosen responses only (TRL adds the prompt's tokens)."""
    given = INPUTS["pairs"]
    leaf, mask = given["logprobs"].clone().requires_grad_(), given["mask"]
    scores = (leaf * mask).sum(1) / (mask.sum(1) if mean else 1.0)
    nll = -(leaf * mask)[:2].sum() / mask[:2].sum()
    zeros = torch.zeros(2, 7, 3)
    trainer = stand_in(concatenated_forward=lambda *a: (scores[:2], scores[2:], zeros, zeros, nll), **config)
    setattr(trainer, method, lambda *a: getattr(trainer_class, method)(trainer, *a))
    loss, _ = trainer_class.get_batch_loss_metrics(trainer, MagicMock(), {}, "train")
    return {
        "name": name,
        "function": f"{trainer_class.__module__}.{trainer_class.__name__}.get_batch_loss_metrics",
        "config": config,
        "inputs": "pairs",
        **answer(loss, leaf),
    }


def orpo(beta: float) -> dict[str, Any]:
    """ORPO takes the mean log-prob of each response."""
    return without_reference(ORPOTrainer, "odds_ratio_loss", f"orpo-{beta:g}", True, beta=beta)


def cpo(name: str, mean: bool, **config: Any) -> dict[str, Any]:
    """CPO and SimPO; the latter, and IPO, take the mean log-prob of each response."""
    settings = {"alpha": 0.0, "cpo_alpha": 1.0, "label_smoothing": 0.0, "simpo_gamma": 0.5, **config}
    return without_reference(CPOTrainer, "cpo_loss", name, mean, **settings)


def grpo_entries() -> list[dict[str, Any]]:
    """Aggregations, clipping, the KL with and without its correction."""
    kinds = (("tokens", "grpo"), ("tokens", "dapo"), ("tokens", "bnpo"), ("tokens", "dr_grpo"), ("rows", "dapo"))
    variants: dict[str, dict[str, Any]] = {
        "clip": {},
        "clip_higher": {"epsilon_high": 0.28},
        "kl": {"beta": 0.04},
        "kl_uncorrected": {"beta": 0.04, "use_bias_correction_kl": False},
    }
    return [
        *(
            grpo(f"{kind}-{inputs}-{variant}", inputs, loss_type=kind, **config)
            for inputs, kind in kinds
            for variant, config in variants.items()
        ),
        # its metrics divide by the length of each row, the loss does not: a masked row counts as a sequence
        grpo("grpo-rows-clip", "rows", loss_type="grpo"),
        grpo("dr_grpo-rows-clip", "rows", loss_type="dr_grpo"),
    ]


def ratio_entries() -> list[dict[str, Any]]:
    """The other policy losses."""
    sequence = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
    return [
        grpo("delta-3", "tokens", delta=3.0),
        grpo("delta-1.1", "tokens", delta=1.1),
        grpo("gspo_sequence", "full_rows", **sequence, epsilon_high=0.28),
        grpo("gspo_sequence-paper", "full_rows", **sequence, **{"epsilon": 3e-4, "epsilon_high": 4e-4}),
        grpo("gspo_sequence-masked_row", "rows", **sequence),
        grpo("gspo_sequence-dapo", "full_rows", importance_sampling_level="sequence"),
        grpo("cispo-5", "tokens", loss_type="cispo", epsilon_high=5.0),
        grpo("cispo-2", "tokens", loss_type="cispo", epsilon_high=2.0),
        grpo("sapo", "tokens", loss_type="sapo"),
        grpo("luspo", "full_rows", loss_type="luspo", importance_sampling_level="sequence"),
        grpo("opsm", "rows", off_policy_mask_threshold=0.3),
    ]


def weight_entries() -> list[dict[str, Any]]:
    """Truncated and masked weights of the sampler."""
    bounds = {"vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": 1.4}
    table: dict[str, dict[str, Any]] = {
        "tis-token": {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.5},
        "tis-token-both": {"vllm_importance_sampling_mode": "token_truncate", **bounds},
        "tis-sequence": {
            "vllm_importance_sampling_mode": "sequence_truncate",
            "vllm_importance_sampling_clip_max": 2.0,
        },
        "mis-token": {"vllm_importance_sampling_mode": "token_mask", **bounds},
        "mis-sequence": {"vllm_importance_sampling_mode": "sequence_mask"},
        "mis-sequence-both": {"vllm_importance_sampling_mode": "sequence_mask", **bounds},
    }
    entries = [
        grpo(f"{name}-{inputs}", inputs, epsilon_high=0.28, **config)
        for name, config in table.items()
        for inputs in ("tokens", "rows")
    ]
    return [*entries, grpo("tis-token-kl", "tokens", beta=0.04, **table["tis-token"])]


def preference_entries() -> list[dict[str, Any]]:
    """Losses of pairs."""
    smoothed = {"robust": 0.1, "exo_pair": 0.1, "aot": 0.1}
    others = (
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "sppo_hard",
        "aot",
        "apo_zero",
        "apo_down",
        "sigmoid_norm",
    )
    return [
        *(dpo("sigmoid", beta) for beta in (0.05, 0.1, 0.5)),
        *(dpo(kind, 0.3, **({"label_smoothing": smoothed[kind]} if kind in smoothed else {})) for kind in others),
        dpo("discopop", 0.3, discopop_tau=0.05),
        *(orpo(beta) for beta in (0.1, 0.5)),
        cpo("cpo", False, loss_type="sigmoid", beta=0.1),
        cpo("cpo-smoothed", False, loss_type="sigmoid", beta=0.1, label_smoothing=0.1),
        cpo("cpo-hinge", False, loss_type="hinge", beta=0.1),
        cpo("cpo-ipo", True, loss_type="ipo", beta=0.1),
        cpo("simpo", True, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0),
        cpo("simpo-nll", True, loss_type="simpo", beta=0.1),
        cpo("alphapo", True, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0, alpha=0.25),
    ]


def penalty_entries() -> list[dict[str, Any]]:
    """GRPO's KL alone, without and with its correction, and where others clamp it."""
    return [
        penalty("kl-k3", "tokens"),
        penalty("kl-k3-rows", "rows", loss_type="grpo"),
        penalty("kl-k3-corrected", "tokens", use_bias_correction_kl=True),
        penalty("kl-k3-far", "far"),
    ]


policies = grpo_entries() + ratio_entries() + weight_entries()
labelled = label_entries(INPUTS["full_rows"])
added = penalty_entries() + supervised_entries(INPUTS)
write("trl", trl.__version__, INPUTS, policies + preference_entries() + labelled + added)
