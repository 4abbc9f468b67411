"""Record what TRL's own loss code answers on prepared log-probs.

Run in an environment of its own:  pip install torch==2.13.0, then pip install trl==1.16.0 transformers peft
then:                              python tests/golden/make_trl.py > tests/golden/trl.json

The trainers' methods are called as they are, on a stand-in for the trainer; only the forward pass is replaced, by one that
returns prepared log-probs, so that the gradient with respect to them is TRL's own. All numbers are fp64, but TRL's
ORPO casts to fp32.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import trl
from torch import Tensor
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

generator = torch.Generator().manual_seed(7)


def draw(rows: int, width: int, center: float = -1.5, spread: float = 0.8) -> Tensor:
    """Random log-probs below zero."""
    normal = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (center + spread * normal).clamp(max=-0.02)


def lengths_mask(lengths: list[int], width: int) -> Tensor:
    """Right-padded mask."""
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).double()


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


def record(loss: Tensor, leaf: Tensor, **inputs: Any) -> dict[str, Any]:
    """One golden case."""
    (gradient,) = torch.autograd.grad(loss, leaf)
    given = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return {**given, "logprobs": leaf.tolist(), "loss": float(loss.detach()), "gradient": gradient.tolist()}


def grpo(loss_type: str, beta: float, high: float, correction: bool = True) -> dict[str, Any]:
    """GRPOTrainer._compute_loss."""
    mask = lengths_mask([5, 3, 6, 1], 6)
    leaf = draw(4, 6).requires_grad_()
    old, ref = (leaf.detach() + 0.25 * torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages = torch.tensor([1.0, -0.7, 0.4, -1.2], dtype=torch.float64)
    trainer = stand_in(
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros_like(leaf), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=high,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=6,
        args=SimpleNamespace(use_bias_correction_kl=correction, delta=None, steps_per_generation=1),
        _entropy_bonus_enabled=False,
    )
    ones = torch.ones(4, 1, dtype=torch.int64)
    loss = GRPOTrainer._compute_loss(
        trainer,
        trainer.model,
        {
            "prompt_ids": ones,
            "prompt_mask": ones,
            "completion_ids": torch.ones(4, 6, dtype=torch.int64),
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        },
    )
    settings = {"loss_type": loss_type, "beta": beta, "epsilon_high": high, "correction": correction}
    return record(loss, leaf, mask=mask, advantages=advantages, old=old, ref=ref, **settings)


def dpo(beta: float) -> dict[str, Any]:
    """DPOTrainer._compute_loss with loss_type sigmoid; rows are chosen, then rejected."""
    mask = lengths_mask([5, 3, 2, 6], 6)
    leaf, ref = draw(4, 6).requires_grad_(), draw(4, 6)
    sums = (ref * mask).sum(1)
    nothing = torch.zeros(4, 6)  # for metrics that are not recorded here
    outputs = SimpleNamespace(log_probs=leaf * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    model = MagicMock(return_value=outputs)
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        label_smoothing=0.0,
        _total_train_tokens=0,
        _tp_size=1,
    )
    full = torch.cat([torch.zeros(4, 1), mask], 1)
    inputs = {
        "input_ids": torch.ones(4, 7, dtype=torch.int64),
        "attention_mask": torch.ones(4, 7, dtype=torch.int64),
        "completion_mask": full,
        "ref_chosen_logps": sums[:2],
        "ref_rejected_logps": sums[2:],
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return record(loss, leaf, mask=mask, ref=ref, beta=beta)


def orpo(beta: float, center: float) -> dict[str, Any]:
    """ORPOTrainer.get_batch_loss_metrics; the NLL is taken over the response only (TRL adds the prompt's tokens)."""
    mask = lengths_mask([5, 3, 2, 6], 6)
    leaf = draw(4, 6, center).requires_grad_()
    means = (leaf * mask).sum(1) / mask.sum(1)
    nll = -(leaf * mask)[:2].sum() / mask[:2].sum()
    zeros = torch.zeros(2, 6, 3)
    trainer = stand_in(beta=beta, concatenated_forward=lambda *a: (means[:2], means[2:], zeros, zeros, nll))
    trainer.odds_ratio_loss = lambda *a: ORPOTrainer.odds_ratio_loss(trainer, *a)
    loss, _ = ORPOTrainer.get_batch_loss_metrics(trainer, MagicMock(), {}, "train")
    return record(loss, leaf, mask=mask, beta=beta)


def main() -> None:
    """Print the document."""
    document = {
        "made_by": "tests/golden/make_trl.py",
        "trl": trl.__version__,
        "torch": torch.__version__.split("+")[0],
        "grpo": [
            grpo(kind, beta, high, correction)
            for kind in ("grpo", "dapo", "bnpo", "dr_grpo")
            for beta, high, correction in ((0.0, 0.2, True), (0.0, 0.28, True), (0.04, 0.2, True), (0.04, 0.2, False))
        ],
        "dpo": [dpo(beta) for beta in (0.05, 0.1, 0.5)],
        "orpo": [orpo(beta, center) for beta, center in ((0.1, -1.5), (0.5, -3.0), (0.1, -0.2))],
    }
    json.dump(document, sys.stdout)


main()
