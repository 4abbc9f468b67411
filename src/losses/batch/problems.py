"""What is wrong with the values of a batch: raised at once where they can be read, else kept for `LossOutput.check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .selection import readable

__all__ = ["Problem", "raise_first", "raise_readable"]


class Problem(NamedTuple):
    """Something that may be wrong.

    Attributes:
        present: bool, 0-d; whether it is.
        error: makes the error that says so.
    """

    present: Tensor
    error: Callable[[], Exception]


def raise_readable(problems: Iterable[Problem | None]) -> tuple[Problem, ...]:
    """Raise the first problem that can be seen for nothing; return those that cannot be looked at yet."""
    deferred = []
    for problem in problems:
        if problem is None:
            continue
        if not readable(problem.present):
            deferred.append(problem)
        elif problem.present.item():
            raise problem.error()
    return tuple(deferred)


def raise_first(problems: tuple[Problem, ...]) -> None:
    """Read all problems in one transfer and raise the first that is present."""
    if not problems:
        return
    present = torch.stack([problem.present for problem in problems]).tolist()
    for problem, there in zip(problems, present, strict=True):
        if there:
            raise problem.error()
