"""What the check of its kind says of a piece of an exhibit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from ..conformance import PROMISES, run_check
from ..datacheck import TinyTokenizer, check_builder
from ..losscheck.check import check_property
from ..losscheck.forms import loss_under_test
from ..modelcheck.check import check_model
from ..under_test import BackendUnderTest
from .exhibit import Exhibit, Kind

__all__ = ["Finding", "examine"]


@final
@dataclass(frozen=True)
class Finding:
    """What a check says.

    Attributes:
        found: whether it raises an alarm.
        sentence: what it says, with the cause; empty where it says nothing.
    """

    found: bool
    sentence: str = ""


def examine(exhibit: Exhibit, piece: Callable[..., Any] | None = None, *, examples: int = 8) -> Finding:
    """Run the check that an exhibit belongs to.

    Args:
        exhibit: says which property, row or promise.
        piece: ``exhibit.broken`` or ``exhibit.repaired``, or a function of yours in its place; absent: the broken one.
        examples: random batches, for a loss.
    """
    return _CHECKS[exhibit.kind](exhibit, piece or exhibit.broken, examples)


def _loss(exhibit: Exhibit, piece: Callable[..., Any], examples: int) -> Finding:
    result = check_property(loss_under_test(piece, **exhibit.options), exhibit.found_by, examples)
    return Finding(result.verdict == "failed", result.sentence)


def _data(exhibit: Exhibit, piece: Callable[..., Any], _: int) -> Finding:
    row = check_builder(piece, TinyTokenizer(), only=exhibit.found_by, **exhibit.options)[0]
    return Finding(row.verdict == "wrong", row.reason)


def _model(exhibit: Exhibit, piece: Callable[..., Any], _: int) -> Finding:
    rows = check_model(piece, only=exhibit.found_by, **{"lora": 2, **exhibit.options})
    wrong = [row for row in rows if row.verdict in ("wrong", "refused")]
    return Finding(True, wrong[0].reason) if wrong else Finding(False)


def _backend(exhibit: Exhibit, piece: Callable[..., Any], _: int) -> Finding:
    kind: Any = piece
    under_test = kind.under_test() if hasattr(kind, "under_test") else BackendUnderTest(kind, **exhibit.options)
    result = run_check(PROMISES[exhibit.found_by], under_test)
    return Finding(True, f"{result.sentence}; {result.cause}") if result.verdict == "failed" else Finding(False)


_CHECKS: Final[Mapping[Kind, Callable[[Exhibit, Callable[..., Any], int], Finding]]] = {
    "loss": _loss,
    "data": _data,
    "model": _model,
    "backend": _backend,
}
