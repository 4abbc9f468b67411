"""Group advantages: how much better a response is than the others of its prompt."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...errors import DatumError, LengthError
from ..checks import choice, number

__all__ = ["GroupAdvantages", "group_advantages"]


class GroupAdvantages(NamedTuple):
    """Advantages and how many groups carry no signal.

    Attributes:
        advantages: float [B]; exactly 0 in a group of one or of equal rewards.
        singletons: groups with one member.
        equal: groups of two or more whose rewards are all the same.
    """

    advantages: Tensor
    singletons: int
    equal: int


def group_advantages(
    rewards: Tensor,
    group_id: Tensor,
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
) -> GroupAdvantages:
    """Compare each reward with its group.

    ``A_i = (r_i - b_i) / (s + eps)`` with b the group mean, or the mean of the *other* members (RLOO), and s the
    sample standard deviation (ddof 1), or ``A_i = r_i - b_i`` without scale.

    Args:
        rewards: [B], any float dtype.
        group_id: int [B]; equal numbers are one group, in any order.
        baseline: ``mean`` (GRPO, Dr. GRPO) or ``leave_one_out`` (RLOO).
        scale: ``std`` (GRPO) or ``none`` (Dr. GRPO, RLOO).
        eps: added to the standard deviation.

    Returns:
        Advantages of the dtype of ``rewards`` (fp32 or better), and the counts of groups without signal. Such groups get
        exactly 0: of one member nothing can be said, and equal rewards leave rounding residue that a small standard
        deviation would blow up (7 copies of 0.1 give 7e-3).

    Raises:
        LengthError: the shapes differ or are not [B].
        DatumError: a reward is NaN or inf, or something is no tensor.
        ConfigError: an unknown baseline or scale, or a negative eps.

    Source: DeepSeekMath (arXiv:2402.03300, section 4.1.2), Dr. GRPO (arXiv:2503.20783), RLOO (arXiv:2402.14740).
    """
    choice("baseline", baseline, ("mean", "leave_one_out"))
    choice("scale", scale, ("std", "none"))
    number("eps", eps, low=0.0, strict=False)
    _check_rewards(rewards, group_id)
    exact = rewards.double()
    ids, index = torch.unique(group_id, return_inverse=True)
    size = torch.bincount(index, minlength=ids.numel()).double()
    centred = exact - (torch.zeros_like(size).index_add(0, index, exact) / size)[index]
    silent = _without_signal(exact, index, ids.numel())
    if scale == "std":
        variance = torch.zeros_like(size).index_add(0, index, centred.square()) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)[index]
    if baseline == "leave_one_out":
        # r_i - mean of the others = (n / (n - 1)) (r_i - mean)
        centred = centred * (size / (size - 1).clamp(min=1))[index]
    advantages = torch.where(silent[index], torch.zeros_like(centred), centred)
    dtype = rewards.dtype if rewards.dtype == torch.float64 else torch.float32
    return GroupAdvantages(advantages.to(dtype), int((size == 1).sum()), int((silent & (size > 1)).sum()))


def _check_rewards(rewards: Tensor, group_id: Tensor) -> None:
    for name, given in (("rewards", rewards), ("group_id", group_id)):
        if not isinstance(given, Tensor):
            raise DatumError(f"{name} must be a tensor, one number per sequence, got {type(given).__name__}")
    if rewards.dim() != 1 or rewards.shape != group_id.shape:
        raise LengthError(
            f"rewards and group_id must both be [B], got {tuple(rewards.shape)} and {tuple(group_id.shape)}"
        )
    if not bool(torch.isfinite(rewards).all()):
        broken = (~torch.isfinite(rewards)).nonzero().squeeze(1).tolist()
        raise DatumError(f"rewards must be finite; sequences {broken} are not")


def _without_signal(rewards: Tensor, index: Tensor, groups: int) -> Tensor:
    low = rewards.new_full((groups,), float("inf")).scatter_reduce(0, index, rewards, "amin")
    high = rewards.new_full((groups,), float("-inf")).scatter_reduce(0, index, rewards, "amax")
    return low == high
