"""What the pattern of a divergence of log-probs says of its cause."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from ...datums.types import Datum
from .numbers import Pairs

__all__ = ["logprob_cause", "shifted"]

_SHARE: Final = 0.5  # of the tokens from its first one on, which a pattern must reach
Alone = Callable[[int], tuple[Tensor, Tensor]]


def logprob_cause(pairs: Pairs, limit: float, data: Sequence[Datum], alone: Alone) -> str:
    """Return the likely cause of log-probs that differ.

    Args:
        pairs: the log-probs.
        limit: a token differs where they are further apart.
        data: the datums.
        alone: returns what both backends say of one datum in a call of its own.
    """
    bad = pairs.beyond(limit)
    rules: Sequence[Callable[[], str]] = (
        lambda: _not_finite(pairs),
        lambda: _reordered(pairs, limit),
        lambda: shifted(pairs, limit),
        lambda: _mixed(pairs, limit, bad, alone),
        lambda: _ends(bad),
        lambda: _after_position(bad),
        lambda: _after_token(bad, data),
        lambda: _everywhere(pairs, bad),
    )
    return next((cause for rule in rules if (cause := rule())), "no pattern that is known")


def shifted(pairs: Pairs, limit: float) -> str:
    """Say so if one side is the other, moved by one token."""
    long = [(a.reshape(len(a), -1), b.reshape(len(b), -1)) for a, b in zip(pairs.a, pairs.b, strict=True) if len(a) > 2]
    for later, earlier, moved, other in ((0, 1, "b", "a"), (1, 0, "a", "b")):
        sides = [(pair[later][:-1], pair[earlier][1:]) for pair in long]
        if sides and all(float((x.double() - y.double()).abs().max()) <= limit for x, y in sides):
            return (
                f"{moved}'s numbers are {other}'s of one token earlier: a shift (targets moved once too often, or a "
                "first token that one side adds)"
            )
    return ""


def _not_finite(pairs: Pairs) -> str:
    for name, side in (("a", pairs.a), ("b", pairs.b)):
        broken = [i for i, x in enumerate(side) if not bool(x.isfinite().all())]
        if broken:
            return f"{name} gives NaN or infinity in datums {broken}: an overflow, or weights that are not finite"
    return ""


def _reordered(pairs: Pairs, limit: float) -> str:
    """Each datum of b is another one's of a."""
    taken: list[int] = []
    for y in pairs.b:
        free = (i for i, x in enumerate(pairs.a) if i not in taken and _close(x, y, limit))
        taken.append(next(free, -1))
    if -1 in taken or taken == sorted(taken):
        return ""
    return f"the datums come back in another order: b's are a's {taken}"


def _close(x: Tensor, y: Tensor, limit: float) -> bool:
    return x.shape == y.shape and float((x.double() - y.double()).abs().max()) <= limit


def _mixed(pairs: Pairs, limit: float, bad: Sequence[Tensor], alone: Alone) -> str:
    """One datum says something else in a call of its own."""
    if len(bad) == 1:
        return ""
    worst = max(range(len(bad)), key=lambda i: float(pairs.by_token[i].max()))
    for name, apart, together in zip("ab", alone(worst), (pairs.a[worst], pairs.b[worst]), strict=True):
        if not _close(apart, together, limit):
            return (
                f"{name} gives datum {worst} other log-probs in a call of its own: sequences of one call see each other there "
                "(packing, padding or attention masks), or its calls are not repeatable"
            )
    return ""


def _affected(bad: Sequence[Tensor]) -> dict[int, int]:
    """The first token that differs, by datum."""
    return {i: int(mask.nonzero()[0, 0]) for i, mask in enumerate(bad) if bool(mask.any())}


def _ends(bad: Sequence[Tensor]) -> str:
    """Only the first, or the last, token of every text."""
    long = [mask for mask in bad if len(mask) > 1]
    if not long or len(long) < len(bad):
        return ""
    for at, rest, words in ((0, slice(1, None), "first"), (-1, slice(None, -1), "last")):
        if all(bool(mask[at]) and not bool(mask[rest].any()) for mask in long):
            what = {"first": "a beginning-of-text token, or positions that begin at another number"}
            return (
                f"only the {words} token of every text: {what.get(words, 'the end is cut, or its target is another')}"
            )
    return ""


def _after_position(bad: Sequence[Tensor]) -> str:
    """All texts agree up to one position."""
    first = _affected(bad)
    n = min(first.values())
    longer = [i for i, mask in enumerate(bad) if len(mask) > n + 1]
    late = max(first.values()) - n
    if n == 0 or late > 1 or any(i not in first for i in longer):
        return ""
    after = torch.cat([bad[i][first[i] :] for i in first]).double().mean()
    if float(after) < _SHARE:
        return ""
    return (
        f"every text agrees up to position {n - 1} and differs from position {n} on: an attention window or chunk of {n} "
        "tokens, a RoPE scaling or context limit, or positions or texts that are cut there, on one side only"
    )


def _after_token(bad: Sequence[Tensor], data: Sequence[Datum]) -> str:
    """All texts agree up to the same token."""
    first = _affected(bad)
    tokens = {data[i].model_input.to_ints()[at] for i, at in first.items()}
    if len(tokens) != 1:
        return ""
    (token,) = tokens
    places = {i: datum.model_input.to_ints().index(token) for i, datum in enumerate(data) if _has(datum, token)}
    if places != first:
        return ""
    return f"every text agrees up to token {token} and differs from it on: the row of the embedding that belongs to it"


def _has(datum: Datum, token: int) -> bool:
    return bool((datum.model_input.tokens == token).any())


def _everywhere(pairs: Pairs, bad: Sequence[Tensor]) -> str:
    share = float(torch.cat(list(bad)).double().mean())
    if share < _SHARE:
        where = sorted(_affected(bad))
        return f"no pattern that is known: {share:.0%} of the tokens, in datums {_spans(where)}"
    signs = torch.sign(pairs.flat_b - pairs.flat_a).unique().tolist()
    if share == 1.0 and len(signs) == 1 and len(pairs.flat_a) > 4:
        less, more = ("b", "a") if signs[0] < 0 else ("a", "b")
        return (
            f"{less} gives every token a smaller log-prob than {more}: its softmax runs over more entries (a padded "
            "vocabulary), or it has another temperature"
        )
    return "almost every token: other weights, an adapter on one side only, another dtype, or another tokenizer"


def _spans(numbers: Sequence[int]) -> str:
    """``0-3, 7``."""
    if not numbers:
        return ""
    breaks = [i + 1 for i, (x, y) in enumerate(pairwise(numbers)) if y != x + 1]
    parts = [numbers[i:j] for i, j in pairwise([0, *breaks, len(numbers)])]
    return ", ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
