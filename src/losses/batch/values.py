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


def sound(batch: TokenBatch, loss: Tensor, inputs: Sequence[str]) -> bool:
    """Return whether there is no sign of a value that `examine` refuses, as far as looking is free.

    Args:
        batch: the tensors.
        loss: what was computed from them; it may be finite where a log-prob is not, as the ratio of -inf is 0, and one to
            -inf is clipped.
        inputs: fields of the batch that the loss reads, beside the log-probs.
    """
    if not readable(batch.logprobs):
        return True
    x = batch.logprobs.detach()
    if not x.numel():
        return finite(loss)
    within = x.amax().item() <= LARGEST_LOGPROB if batch.shown_finite() else _within(x)
    others = (getattr(batch, name) for name in _LOGPROBS[1:] if name in inputs)
    return finite(loss) and within and all(_within(other) for other in others if other is not None)


def _within(logprobs: Tensor) -> bool:
    """Return whether all are finite and at most 0, as far as looking is free; both ends are NaN where any is."""
    if not readable(logprobs):
        return True
    low, high = logprobs.aminmax()
    return low.item() > -math.inf and high.item() <= LARGEST_LOGPROB


def examine(batch: TokenBatch, inputs: Sequence[str]) -> None:
    """Check the trained values of a batch: what is wrong, how much of it, and the first sequence and token.

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
    if values is None or not (values.is_floating_point() or name in _LOGPROBS):
        return None
    bad = ~torch.isfinite(values.detach())
    if name in _LOGPROBS:
        bad |= values.detach() > LARGEST_LOGPROB
    return bad & batch.trained


def _described(batch: TokenBatch, name: str, bad: Tensor) -> Iterator[str]:
    """Yield one line for each kind of wrong value that there is."""
    values = getattr(batch, name).detach().expand(batch.layout.shape)
    trained = int(batch.trained.sum())
    kinds = {
        "nan": values.isnan(),
        "infinite": values.isinf(),
        "positive": values.isfinite(),
    }
    for kind, at in kinds.items():
        places = (bad & at).nonzero()
        if len(places):
            first = places[0].tolist()
            yield (
                f"{name}: {len(places):,} of {trained:,} trained values {'is' if len(places) == 1 else 'are'} "
                f"{kind}{_hint(name, kind)}; first: {_words(batch, first)} ({float(values[tuple(first)]):g})"
            )


def _hint(name: str, kind: str) -> str:
    if name not in _LOGPROBS:
        return ", a finite number is expected"
    if kind == "positive":
        return ", a log-prob is at most 0 (probabilities, logits, or -logprobs?)"
    return ", a log-prob is a finite number of at most 0"


def _words(batch: TokenBatch, place: list[int]) -> str:
    if not isinstance(batch.layout, Packed):
        return f"sequence {place[0]}, token {place[1]}"
    row = int(batch.layout.index[place[0]])
    return f"sequence {row}, token {place[0] - int(batch.layout.offsets[row])}"
