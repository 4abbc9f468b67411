"""Record what TRL's own loss code answers on the shared inputs.

Run in an environment of its own:  pip install torch==2.13.0, then pip install trl==1.16.0 transformers peft
then:                              python tests/golden/make_trl.py > tests/golden/trl.json

The trainers' methods are called as they are, on a stand-in for the trainer; only the forward pass is replaced, by one that
returns prepared log-probs, so that the gradient with respect to them is TRL's own. The sampler's weights are computed
inside the method that generates; that block of its source is run on prepared log-probs. All numbers are fp64, but
TRL's ORPO casts to fp32.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import trl
from recording import answer, golden_inputs, write
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl_labels import label_entries

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


def stand_in(**attributes: Any) -> Any:
    """Anything a method may ask of its trainer; what matters is given."""
    trainer = MagicMock()
    trainer.model.training = True
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer.accelerator = SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, **_: x,
    )
    trainer.aux_loss_enabled = False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


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
    given = INPUTS[inputs]
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
            "old_per_token_logps": given["old_logprobs"],
            "sampling_per_token_logps": given["rollout_logprobs"],
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


policies = grpo_entries() + ratio_entries() + weight_entries()
labelled = label_entries(INPUTS["full_rows"], stand_in)
write("trl", trl.__version__, INPUTS, policies + preference_entries() + labelled)
