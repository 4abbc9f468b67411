"""What the tensors of a batch may hold: finite numbers, and log-probs of at most 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from ...errors import InvalidDatumsError
from .layout import Packed
from .problems import Problem, raise_first
from .selection import finite, readable
from .token_batch import TokenBatch

__all__ = ["LARGEST_LOGPROB", "examine", "sound", "wrong_values"]

LARGEST_LOGPROB: Final = 0.01  # log-probs are at most 0; half precision may round a little above
_LOGPROBS: Final = ("logprobs", "rollout_logprobs", "old_logprobs", "ref_logprobs")
_NUMBERS: Final = ("weights", "advantages")
_SHOWN: Final = 20


def sound(batch: TokenBatch, loss: Tensor) -> bool:
    """Return whether there is no sign of a value that `examine` refuses, as far as looking is free.

    Args:
        batch: the tensors.
        loss: what was computed from them; it may be finite where a log-prob is not, as the ratio of -inf is 0.
    """
    if not readable(batch.logprobs):
        return True
    x = batch.logprobs.detach()
    if not x.numel():
        return finite(loss)
    # The largest is NaN where any is.
    high_enough = batch.shown_finite() or x.amin().item() > -math.inf
    return finite(loss) and x.amax().item() <= LARGEST_LOGPROB and high_enough


def examine(batch: TokenBatch, inputs: Sequence[str]) -> None:
    """Check the trained values of a batch, with the sequence and token of everything that is wrong.

    Args:
        batch: the tensors.
        inputs: fields of the batch that a loss reads, beside the log-probs.

    Raises:
        InvalidDatumsError: a log-prob is not finite or positive, or another input is not finite.
    """
    raise_first((wrong_values(batch, inputs),))


def wrong_values(batch: TokenBatch, inputs: Sequence[str]) -> Problem:
    """Return the problem of trained values that `examine` refuses; nothing is looked at here."""
    names = ("logprobs", *(n for n in (*_LOGPROBS[1:], *_NUMBERS) if n in inputs))
    wrong = {name: bad for name in names if (bad := _wrong(batch, name)) is not None}
    return Problem(
        torch.stack([bad.any() for bad in wrong.values()]).any(),
        lambda: InvalidDatumsError([each for name, bad in wrong.items() for each in _described(batch, name, bad)]),
    )


def _wrong(batch: TokenBatch, name: str) -> Tensor | None:
    """Return where an input is trained and not what it should be; None if it cannot be wrong."""
    values: Tensor | None = getattr(batch, name)
    if values is None or not values.is_floating_point():
        return None
    bad = ~torch.isfinite(values.detach())
    if name in _LOGPROBS:
        bad |= values.detach() > LARGEST_LOGPROB
    return bad & batch.trained


def _described(batch: TokenBatch, name: str, bad: Tensor) -> Iterator[str]:
    values = getattr(batch, name).detach().expand(batch.layout.shape)
    places = bad.nonzero().tolist()
    for place in places[:_SHOWN]:
        value = float(values[tuple(place)])
        why = "a log-prob is a finite number of at most 0" if name in _LOGPROBS else "a finite number is expected"
        yield f"{_words(batch, place)}: {name} is {value:g}; {why}"
    if len(places) > _SHOWN:
        yield f"{name}: {len(places) - _SHOWN} more values like these"


def _words(batch: TokenBatch, place: list[int]) -> str:
    if not isinstance(batch.layout, Packed):
        return f"sequence {place[0]}, token {place[1]}"
    row = int(batch.layout.index[place[0]])
    return f"sequence {row}, token {place[0] - int(batch.layout.offsets[row])}"
