"""A loss that raises wherever it is called: told once, with the place, instead of once for each property."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ..cases import Case
from .failures import Failed
from .forms import LossUnderTest
from .forms.measured import kind_case, leaves_of, require_connected
from .results import RUNS, Result
from .search import drawn

__all__ = ["crash"]

_OURS: Final = str(Path(__file__).parent)


def crash(under_test: LossUnderTest, examples: int) -> Result | None:
    """Return what is wrong with a loss that runs on no batch, or None once it has run on one.

    Args:
        under_test: the loss.
        examples: random batches that are tried where it does not run on plain ones.
    """
    first: Exception | None = None
    for case in chain(_plain(), _random(under_test, examples)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whether it runs is all that is asked
                loss, _ = under_test.run(case, leaves_of(case))
            require_connected(loss)
        except Exception as error:
            first = first or error
        else:
            return None
    return None if first is None else Result(RUNS, "failed", _sentence(under_test, first))


def _plain() -> Iterator[Case]:
    """Yield two pairs, one pair, and one sequence."""
    whole = kind_case(False)
    for count in (4, 2, 1):
        yield whole.subset(range(count))


def _random(under_test: LossUnderTest, examples: int) -> Iterator[Case]:
    yield from drawn(under_test.unit(), False, examples)


def _sentence(under_test: LossUnderTest, error: Exception) -> str:
    nothing = "on every batch, so nothing could be checked"
    if isinstance(error, Failed):
        return f"{error} {nothing}. Likely cause: {error.cause}."
    told = f"{under_test.name} raises {nothing}: {type(error).__name__}: {error}{_place(error)}"
    return told + _given(under_test)


def _place(error: Exception) -> str:
    """Return where in the loss's own file it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = next((frame.filename for frame in frames if not frame.filename.startswith(_OURS)), None)
    lines = [frame.lineno for frame in frames if frame.filename == theirs]
    return f" ({theirs}:{lines[-1]})" if lines else ""


def _given(under_test: LossUnderTest) -> str:
    """Return what it is given, and how that is changed."""
    if under_test.form == "datums":
        return (
            ". It was given a list of datums and the list of their log-probs, as forward_backward_custom gives them; form= "
            "changes that, and so do arguments of names that are known (logprobs, mask, advantages)."
        )
    case = next(_plain())
    try:
        arguments: Any = under_test.arguments(case, leaves_of(case), under_test.layouts[0])
    except Exception:
        return ""
    if not isinstance(arguments, dict):
        return ""
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in arguments.items() if isinstance(x, Tensor))
    return f". It was given {shapes}; arguments=, form= and per_sequence= change that." if shapes else ""
