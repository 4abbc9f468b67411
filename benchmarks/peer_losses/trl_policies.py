"""TRL's GRPO and the losses that its trainer has beside it: `GRPOTrainer._compute_loss`, on a stand-in for the trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from .wrapped import Wrapped

__all__ = ["TRL_POLICIES"]

_PLACE: Final = "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss"
_ROWS: Final = {"form": "padded", "per_sequence": ("advantages",)}
_DEFAULTS: Final[dict[str, Any]] = {
    "loss_type": "dapo",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "importance_sampling_level": "token",
    "off_policy_mask_threshold": None,
    "max_completion_length": 16,
    "top_entropy_quantile": 1.0,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "current_gradient_accumulation_steps": 1,
    "_entropy_bonus_enabled": False,
    "aux_loss_enabled": False,
}
_ARGUMENTS: Final[dict[str, Any]] = {
    "use_bias_correction_kl": True,
    "delta": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "steps_per_generation": 1,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}


def one_process() -> SimpleNamespace:
    """What accelerate is where there is one process."""
    return SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, **_: x,
    )


def _trainer(trainer_class: Any, logprobs: Tensor, settings: dict[str, Any]) -> SimpleNamespace:
    """What the method asks of its trainer; the forward pass gives these log-probs."""
    arguments = {name: settings.pop(name, value) for name, value in _ARGUMENTS.items()}
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=one_process(),
        args=SimpleNamespace(**arguments),
        get_off_policy_mask=trainer_class.get_off_policy_mask,
        get_gamma_weights=trainer_class.get_gamma_weights,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        **{**_DEFAULTS, **settings},
    )


def _called(settings: dict[str, Any], logprobs: Tensor, mask: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    trainer_class = import_module("trl.trainer.grpo_trainer").GRPOTrainer
    trainer = _trainer(trainer_class, logprobs, dict(settings))
    completion = mask.long()
    prompt = torch.ones(mask.shape[0], 1, dtype=torch.int64)
    given = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(completion),
        "completion_mask": completion,
        "num_items_in_batch": completion.sum(),
        **inputs,
    }
    loss: Tensor = trainer_class._compute_loss(trainer, trainer.model, given)
    return loss


def policy(**settings: Any) -> Callable[..., Tensor]:
    """Return a policy loss; advantages are one per sequence."""

    def grpo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return _called(settings, logprobs, mask, {"old_per_token_logps": old_logprobs, "advantages": advantages})

    return grpo


def with_reference(**settings: Any) -> Callable[..., Tensor]:
    """Return a policy loss with a KL."""

    def grpo(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        anchors = {"old_per_token_logps": old_logprobs, "ref_per_token_logps": ref_logprobs}
        return _called({"beta": 0.04, **settings}, logprobs, mask, {**anchors, "advantages": advantages})

    return grpo


def penalty(**settings: Any) -> Callable[..., Tensor]:
    """Return the KL alone: all advantages are 0, and the policy is its own anchor."""

    def kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        anchors = {"old_per_token_logps": logprobs.detach(), "ref_per_token_logps": ref_logprobs}
        nothing = logprobs.new_zeros(logprobs.shape[0])
        return _called({"beta": 1.0, **settings}, logprobs, mask, {**anchors, "advantages": nothing})

    return kl


def _policy(name: str, build: Callable[..., Any] = policy, **settings: Any) -> Wrapped:
    return Wrapped("TRL", name, _PLACE, partial(build, **settings), _ROWS)


TRL_POLICIES: Final = (
    _policy("grpo", loss_type="grpo"),
    _policy("dapo (default)"),
    _policy("dapo, beta 0.04", with_reference),
    _policy("dapo, beta 0.04, KL not corrected", with_reference, use_bias_correction_kl=False),
    _policy("bnpo", loss_type="bnpo"),
    _policy("dr_grpo", loss_type="dr_grpo"),
    _policy("cispo, default epsilon_high", loss_type="cispo"),
    _policy("cispo, epsilon_high 5", loss_type="cispo", epsilon_high=5.0),
    _policy("grpo, sequence level (GSPO)", loss_type="grpo", importance_sampling_level="sequence"),
    _policy("luspo, sequence level", loss_type="luspo", importance_sampling_level="sequence"),
    _policy("luspo, token level", loss_type="luspo"),
    _policy("sapo", loss_type="sapo"),
    _policy("vespo", loss_type="vespo"),
    _policy("dapo, delta 4", delta=4.0),
    Wrapped("TRL", "KL alone", _PLACE, partial(penalty, loss_type="grpo"), estimates=True),
    Wrapped(
        "TRL",
        "KL alone, not corrected",
        _PLACE,
        partial(penalty, loss_type="grpo", use_bias_correction_kl=False),
        estimates=True,
    ),
)
