"""SkyRL's policy losses, which are sums over advantages that carry the reduction, and its KL estimates."""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final

import typing_extensions
from torch import Tensor

from .wrapped import PADDED, Wrapped

__all__ = ["SKYRL"]

_UTILS: Final = "skyrl.backends.skyrl_train.utils.ppo_utils"


def _module(name: str) -> Any:
    """Import a module of SkyRL, which is written for Python 3.12: pydantic asks there for this TypedDict."""
    own = typing.TypedDict
    typing.TypedDict = typing_extensions.TypedDict
    import_module("loguru").logger.disable("skyrl")  # it warns at every call
    try:
        return import_module(name)
    finally:
        typing.TypedDict = own


def policy(function: str, **settings: Any) -> Callable[..., Any]:
    """Return a policy loss."""

    def loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Any:
        utils, config = _module(_UTILS), _module("skyrl.train.config.config")
        algorithm = config.AlgorithmConfig(**settings)
        return getattr(utils, function)(log_probs, old_log_probs, advantages, algorithm, loss_mask.to(log_probs.dtype))

    return loss


def likelihood(log_probs: Tensor, loss_mask: Tensor) -> Any:
    """SkyRL's cross-entropy, which ignores what policy losses take."""
    nothing = log_probs.detach()
    return policy("cross_entropy_loss")(log_probs, nothing, nothing, loss_mask)


def penalty(kind: str) -> Callable[..., Tensor]:
    """Return a KL, averaged within and over sequences as the worker does."""

    def kl(log_probs: Tensor, ref_log_probs: Tensor, loss_mask: Tensor) -> Tensor:
        utils = _module(_UTILS)
        mask = loss_mask.to(log_probs.dtype)
        values = utils.compute_approx_kl(log_probs, ref_log_probs, mask, kind)
        loss: Tensor = utils.masked_mean(values, mask, dim=-1).mean()
        return loss

    return kl


def _policy(function: str, name: str, **settings: Any) -> Wrapped:
    return Wrapped("SkyRL", name, f"{_UTILS}.{function}", partial(policy, function, **settings))


def _penalty(kind: str) -> Wrapped:
    place = f"{_UTILS}.compute_approx_kl, masked_mean"
    return Wrapped("SkyRL", f"KL alone, {kind}", place, partial(penalty, kind), PADDED, estimates=True)


SKYRL: Final = (
    _policy("ppo_policy_loss", "ppo"),
    _policy("ppo_policy_loss", "ppo, dual clip", policy_loss_type="dual_clip"),
    _policy("gspo_policy_loss", "gspo"),
    _policy("sapo_policy_loss", "sapo", loss_reduction="sequence_mean"),
    _policy("compute_policy_loss_cispo", "cispo"),
    _policy("compute_policy_loss_clip_cov", "clip_cov"),
    _policy("compute_policy_loss_kl_cov", "kl_cov"),
    _policy("dppo_policy_loss", "dppo"),
    _policy("importance_sampling_loss", "importance_sampling"),
    Wrapped("SkyRL", "cross_entropy", f"{_UTILS}.cross_entropy_loss", lambda: likelihood),
    *(_penalty(kind) for kind in ("k1", "k2", "k3")),
)
