"""Liger's chunked losses, which are plain PyTorch: the functions that its autograd functions differentiate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from .wrapped import Setting, Wrapped, interleaved, two_token_logits

__all__ = ["LIGER", "LIGER_SETTINGS"]

_CHUNKED: Final = "liger_kernel.chunked_loss"
_GRPO: Final = f"{_CHUNKED}.grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn"
_BASE: Final = f"{_CHUNKED}.fused_linear_preference.LigerFusedLinearPreferenceBase._compute_loss"
_ROWS: Final = {"form": "padded", "per_sequence": ("advantages",)}
_PAIRS: Final = {"form": "padded", "kind": "pair"}


def policy(**settings: Any) -> Callable[..., Tensor]:
    """Return a policy loss without a KL."""

    def grpo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return _grpo(logprobs, mask, advantages, old_per_token_logps=old_logprobs, beta=0.0, **settings)

    return grpo


def with_reference(**settings: Any) -> Callable[..., Tensor]:
    """Return a policy loss with a KL."""

    def grpo(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        anchors = {"old_per_token_logps": old_logprobs, "ref_per_token_logps": ref_logprobs}
        return _grpo(logprobs, mask, advantages, **anchors, **settings)

    return grpo


def penalty(**settings: Any) -> Callable[..., Tensor]:
    """Return the KL alone."""

    def kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        nothing = logprobs.new_zeros(logprobs.shape[0])
        return _grpo(logprobs, mask, nothing, ref_per_token_logps=ref_logprobs, beta=1.0, **settings)

    return kl


def _grpo(logprobs: Tensor, mask: Tensor, advantages: Tensor, **settings: Any) -> Tensor:
    function = import_module(f"{_CHUNKED}.grpo_loss").LigerFusedLinearGRPOFunction.ppo_loss_fn
    whole = mask.long()
    loss: Tensor = function(logprobs, whole, advantages, whole, **settings)[0]
    return loss


def preference(module: str, function: str, reference: bool = False, **settings: Any) -> Callable[..., Tensor]:
    """Return a loss of pairs: from logits over two tokens, through Liger's own log-probs and reductions."""

    def loss(logprobs: Tensor, mask: Tensor) -> Tensor:
        return _preference(module, function, logprobs, None, mask, settings)

    def against(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        return _preference(module, function, logprobs, ref_logprobs, mask, settings)

    return against if reference else loss


def _preference(
    module: str, function: str, logprobs: Tensor, ref: Tensor | None, mask: Tensor, settings: dict[str, Any]
) -> Tensor:
    base = import_module(f"{_CHUNKED}.fused_linear_preference").LigerFusedLinearPreferenceBase
    labels = interleaved(torch.where(mask != 0, 0, -100))
    identity = torch.eye(2, dtype=logprobs.dtype)
    frozen = {} if ref is None else _frozen(ref, mask, identity)
    loss: Tensor = base._compute_loss(
        interleaved(two_token_logits(logprobs, mask)),
        identity,
        labels,
        preference_loss_fn=getattr(import_module(f"{_CHUNKED}.{module}"), function).preference_loss_fn,
        full_target=labels,
        **frozen,
        **settings,
    )[0]
    return loss


def _frozen(ref: Tensor, mask: Tensor, identity: Tensor) -> dict[str, Any]:
    logits = interleaved(two_token_logits(ref, mask))
    return {"use_ref_model": True, "ref_input_chunk": logits, "ref_weight": identity}


def odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """The odds-ratio part of ORPO's loss, of mean log-probs."""
    function = import_module(f"{_CHUNKED}.orpo_loss").LigerFusedLinearORPOFunction.preference_loss_fn
    targets = torch.zeros(2 * chosen_logps.numel(), 1, dtype=torch.int64)
    return function(chosen_logps, rejected_logps, targets)[0]  # type: ignore[no-any-return]


def _policy(name: str, build: Callable[..., Any] = policy, **settings: Any) -> Wrapped:
    return Wrapped("Liger", name, _GRPO, partial(build, **settings), _ROWS)


def _pair(name: str, module: str, function: str, **settings: Any) -> Wrapped:
    place = f"{_CHUNKED}.{module}.{function}.preference_loss_fn"
    return Wrapped("Liger", name, place, partial(preference, module, function, **settings), _PAIRS)


_DPO = partial(
    preference, "dpo_loss", "LigerFusedLinearDPOFunction", True, compute_nll_loss=False, average_log_prob=False
)

LIGER: Final = (
    _policy("grpo", loss_type="grpo"),
    _policy("dapo (default)"),
    _policy("dapo, beta 0.04 (default)", with_reference),
    _policy("cispo, default epsilon_high", loss_type="cispo"),
    _policy("cispo, epsilon_high 5", loss_type="cispo", epsilon_high=5.0),
    _policy("sapo", loss_type="sapo"),
    _policy("vespo", loss_type="vespo"),
    _policy("luspo, sequence level", loss_type="luspo", importance_sampling_level="sequence"),
    _policy("luspo, token level", loss_type="luspo"),
    Wrapped("Liger", "KL alone", _GRPO, partial(penalty, loss_type="grpo"), estimates=True),
    Wrapped(
        "Liger",
        "KL alone, use_bias_correction_kl",
        _GRPO,
        partial(penalty, loss_type="grpo", use_bias_correction_kl=True),
        estimates=True,
    ),
    _pair(
        "dpo",
        "dpo_loss",
        "LigerFusedLinearDPOFunction",
        reference=True,
        compute_nll_loss=False,
        average_log_prob=False,
    ),
    _pair("orpo", "orpo_loss", "LigerFusedLinearORPOFunction"),
    Wrapped(
        "Liger",
        "orpo, odds ratio alone",
        f"{_CHUNKED}.orpo_loss.LigerFusedLinearORPOFunction.preference_loss_fn",
        lambda: odds_ratio,
        {"form": "trl"},
    ),
    _pair("cpo", "cpo_loss", "LigerFusedLinearCPOFunction", average_log_prob=False),
    _pair("simpo", "simpo_loss", "LigerFusedLinearSimPOFunction", compute_nll_loss=False, beta=2.0),
)
LIGER_SETTINGS: Final = (
    Setting("Liger", "dpo", _BASE, "label_smoothing 0.2", _DPO, partial(_DPO, label_smoothing=0.2), _PAIRS),
    Setting(
        "Liger",
        "cpo",
        _BASE,
        "label_smoothing 0.2",
        partial(preference, "cpo_loss", "LigerFusedLinearCPOFunction"),
        partial(preference, "cpo_loss", "LigerFusedLinearCPOFunction", label_smoothing=0.2),
        _PAIRS,
    ),
)
