"""What the tests of `diff` share: data, a function as a loss, and names that are alike in every worker."""

from __future__ import annotations

from typing import Any, Final

import torch
from helpers import make_data
from torch import Tensor

from pullback.testing import BackendDiff

__all__ = ["DATA", "named", "squares", "verdicts"]

DATA: Final = make_data([5, 3, 7, 4])


def verdicts(found: BackendDiff) -> list[str]:
    return [stage.verdict for stage in found.stages]


def squares(data: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([x.square().sum() for x in logprobs]).sum(), {}


def named(loss: object) -> str:
    """The same in every worker; the name of a function has no address."""
    return loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
