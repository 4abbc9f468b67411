"""torchrl's losses for language models: its loss modules, on an actor that gives prepared log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from pullback.testing import Case

from .wrapped import PADDED, Wrapped, selected

__all__ = ["TORCHRL"]

_LLM: Final = "torchrl.objectives.llm"
_KEYS: Final = {"old": ("log_probs", "full"), "ref": ("next", "ref_log_probs", "full"), "ids": ("tokens", "full")}


def _module(name: str, **settings: Any) -> Any:
    """Return a loss module of torchrl's."""
    nn = import_module("tensordict.nn")

    class Actor(nn.TensorDictModuleBase):  # type: ignore[misc,name-defined]
        """Its distribution has the mask and the log-probs of the call."""

        in_keys: tuple[str, ...] = ()
        out_keys: tuple[str, ...] = ()

        def __init__(self) -> None:
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(1))

        def get_dist(self, data: Any, **_: Any) -> Any:
            return SimpleNamespace(mask=data["trained"], log_prob=lambda _: data["current"])

    return getattr(import_module(f"{_LLM}.grpo"), name)(Actor(), entropy_bonus=False, **settings)


def policy(name: str, **settings: Any) -> Callable[..., Any]:
    """Return a policy loss."""
    module = _module(name, **settings)

    def loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        return _called(module, logprobs, old_logprobs, advantages, mask).loss_objective

    return loss


def with_reference(name: str, **settings: Any) -> Callable[..., Any]:
    """Return a policy loss with a KL."""
    module = _module(name, kl_to_ref_coeff=0.04, **settings)

    def loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        output = _called(module, logprobs, old_logprobs, advantages, mask, ref_logprobs)
        return output.loss_objective + output.loss_kl_to_ref

    return loss


def _called(
    module: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor | None = None
) -> Any:
    columns: dict[Any, Tensor] = {
        "current": logprobs,
        "trained": mask.bool(),
        "advantage": advantages[..., None],
        _KEYS["ids"]: torch.zeros_like(mask, dtype=torch.int64),
        _KEYS["old"]: old,
    }
    if ref is not None:
        columns[_KEYS["ref"]] = ref
    return module(import_module("tensordict").TensorDict(columns, [logprobs.shape[0]]))


def minor_sft(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Any:
    """MinorSFT, of the log-probs of whole sequences."""
    policy_sums, reference_sums = (torch.where(mask, x, 0.0).sum(-1) for x in (logprobs, ref_logprobs))
    return import_module(f"{_LLM}.sft").minor_sft_loss(policy_sums, reference_sums, 0.1, "mean")


def penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Any:
    """The KL of `DistillationLoss`, which masks the log-probs and takes the mean of a sequence's, and then of all, as here."""
    student, teacher = selected(logprobs, mask), selected(ref_logprobs, mask)
    values = import_module(f"{_LLM}.distillation").k3_kl_token_estimate(teacher, student)
    return (values.sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def cispo_gradient(case: Case) -> Sequence[Sequence[float]]:
    """The gradient of CISPO in torchrl's range: a clipped ratio is a weight, and no token loses its gradient."""
    count = sum(len(s.trained()) for s in case.sequences)

    def slope(x: float, old: float, advantage: float, weight: float) -> float:
        return -min(max(math.exp(x - old), 0.8), 1.2) * advantage / count if weight else 0.0

    columns = [(s.logprobs, s.old_logprobs, s.advantages, s.weights) for s in case.sequences]
    return [[slope(*token) for token in zip(*four, strict=True)] for four in columns]


def _policy(name: str, words: str, build: Callable[..., Any] = policy, **settings: Any) -> Wrapped:
    return Wrapped("torchrl", words, f"{_LLM}.grpo.{name}", partial(build, name, **settings), PADDED)


TORCHRL: Final = (
    _policy("GRPOLoss", "GRPOLoss"),
    _policy("GRPOLoss", "GRPOLoss, kl_to_ref_coeff 0.04", with_reference),
    _policy("GRPOLoss", "GRPOLoss, prompt_mean", aggregation="prompt_mean"),
    Wrapped(
        "torchrl",
        "CISPOLoss",
        f"{_LLM}.grpo.CISPOLoss",
        partial(policy, "CISPOLoss"),
        {**PADDED, "expected": cispo_gradient},
    ),
    Wrapped("torchrl", "minor_sft_loss", f"{_LLM}.sft.minor_sft_loss", lambda: minor_sft),
    Wrapped(
        "torchrl",
        "KL alone, distillation",
        f"{_LLM}.distillation.k3_kl_token_estimate",
        lambda: penalty,
        PADDED,
        estimates=True,
    ),
)
