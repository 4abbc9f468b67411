"""verl's policy losses and KL penalties, by their registered names, and its distillation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final

from torch import Tensor

from .wrapped import PADDED, Setting, Wrapped

__all__ = ["VERL", "VERL_SETTINGS"]

_ALGOS: Final = "verl.trainer.ppo.core_algos"


def policy(mode: str, aggregation: str = "token-mean", **settings: Any) -> Callable[..., Any]:
    """Return a registered policy loss."""

    def loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor) -> Any:
        function = import_module(_ALGOS).get_policy_loss_fn(mode)
        return function(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask.long(),
            loss_agg_mode=aggregation,
            config=_actor(settings),
        )

    return loss


def _actor(settings: dict[str, Any]) -> Any:
    """The actor's configuration; its policy loss has fields of its own."""
    config = import_module("verl.workers.config.actor")
    own = {key: value for key, value in settings.items() if key == "dro_beta"}
    rest = {key: value for key, value in settings.items() if key not in own}
    return config.ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=config.PolicyLossConfig(**own), **rest
    )


def geometric(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor) -> Any:
    """GMPO, which is made for one advantage per sequence."""
    return policy("geo_mean")(log_prob, old_log_prob, advantages[:, None].expand_as(log_prob), response_mask)


def penalty(kind: str) -> Callable[..., Tensor]:
    """Return a KL penalty, aggregated as the actor does."""

    def kl(log_prob: Tensor, ref_log_prob: Tensor, response_mask: Tensor) -> Tensor:
        algos = import_module(_ALGOS)
        loss: Tensor = algos.agg_loss(
            algos.kl_penalty(log_prob, ref_log_prob, kind), response_mask.long(), "token-mean"
        )
        return loss

    return kl


def distillation(kind: str) -> Callable[..., Any]:
    """Return the policy gradient whose advantages are a KL estimate's opposite, as `distillation_loss` takes them."""

    def loss(log_prob: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor, response_mask: Tensor) -> Any:
        estimate = import_module(_ALGOS).kl_penalty(log_prob, ref_log_prob, kind)
        return policy("vanilla")(log_prob, old_log_prob, -estimate.detach(), response_mask)

    return loss


def _policy(mode: str, name: str | None = None, aggregation: str = "token-mean", **settings: Any) -> Wrapped:
    place = f"{_ALGOS}.compute_policy_loss_{mode}"
    return Wrapped("verl", name or mode, place, partial(policy, mode, aggregation, **settings), {"form": "verl"})


def _penalty(kind: str) -> Wrapped:
    place = f"{_ALGOS}.kl_penalty, agg_loss"
    return Wrapped("verl", f"KL alone, {kind}", place, partial(penalty, kind), PADDED, estimates=True)


def _distillation(kind: str, words: str = "") -> Wrapped:
    place = "verl.trainer.distillation.losses.distillation_loss"
    name = f"distillation by policy gradient, {kind}{words}"
    return Wrapped("verl", name, place, partial(distillation, kind), {"form": "verl"}, estimates=True)


VERL: Final = (
    _policy("vanilla", "vanilla (default, dual clip at 3)"),
    _policy("vanilla", "vanilla, seq-mean-token-mean", "seq-mean-token-mean"),
    _policy("vanilla", "vanilla, seq-mean-token-sum-norm", "seq-mean-token-sum-norm"),
    _policy("gspo", aggregation="seq-mean-token-mean"),
    _policy("gpg"),
    _policy("clip_cov"),
    _policy("kl_cov"),
    Wrapped(
        "verl",
        "geo_mean",
        f"{_ALGOS}.compute_policy_loss_geo_mean",
        lambda: geometric,
        {"form": "verl", "per_sequence": ("advantages",)},
    ),
    _policy("dro", dro_beta=0.05),
    _policy("cispo"),
    _policy("sapo", aggregation="seq-mean-token-mean"),
    _policy("dppo_tv"),
    _policy("dppo_kl"),
    *(_penalty(kind) for kind in ("k1", "abs", "k2", "k3", "k3+")),
    _distillation("k1"),
    _distillation("k3", " (default)"),
)
VERL_SETTINGS: Final = (
    Setting(
        "verl",
        "geo_mean",
        f"{_ALGOS}.compute_policy_loss_geo_mean",
        "loss_agg_mode token-sum",
        partial(policy, "geo_mean"),
        partial(policy, "geo_mean", "token-sum"),
        {"form": "verl"},
    ),
    Setting(
        "verl",
        "vanilla",
        f"{_ALGOS}.compute_policy_loss_vanilla",
        "loss_agg_mode token-sum",
        partial(policy, "vanilla"),
        partial(policy, "vanilla", "token-sum"),
        {"form": "verl"},
    ),
)
