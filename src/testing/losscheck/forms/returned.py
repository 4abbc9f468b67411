"""What a function of a loss returned: the loss, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..failures import Failed

__all__ = ["loss_and_metrics"]


def loss_and_metrics(returned: Any, name: str) -> tuple[Tensor, Mapping[str, Any]]:
    """Return the loss and the metrics of what a function returned.

    A tuple has the loss first; a mapping or an object has it as ``loss``. It is one number, or one for each row or pair.

    Raises:
        Failed: there is no such number.
    """
    loss, metrics = returned, {}
    if isinstance(returned, Mapping):
        loss, metrics = returned.get("loss"), {k: v for k, v in returned.items() if k != "loss"}
    elif isinstance(returned, tuple) and returned:
        loss, rest = returned[0], returned[1:]
        metrics = dict(rest[0]) if len(rest) == 1 and isinstance(rest[0], Mapping) else dict(_named(rest))
    elif not isinstance(returned, Tensor) and hasattr(returned, "loss"):
        loss = returned.loss
    if not isinstance(loss, Tensor):
        raise Failed(f"{name} returned {type(loss).__name__} in the place of the loss", "it must be a tensor")
    if loss.dim() > 1:
        raise Failed(f"{name} returned a loss of shape {tuple(loss.shape)}", "a loss is one number: reduce it")
    return loss, metrics


def _named(rest: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return further values of a tuple with names, e.g. of verl's ``(loss, clipfrac, kl, ...)``.

    They are results rather than metrics: of one for each row or pair, as TRL's rewards of a pair are, the mean is looked at.
    """
    return [(f"returned[{i + 1}]", value.mean() if _many(value) else value) for i, value in enumerate(rest)]


def _many(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1
