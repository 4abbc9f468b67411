"""Micro-batches: which sequences go through the model together, and in which layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from ....datums.types import Datum
from ....losses.adapt import as_tensor
from ....losses.base import Loss

__all__ = [
    "Layout",
    "Rows",
    "ScoreRequest",
    "arrange",
    "loss_units",
    "micro_batches",
    "own_lengths",
    "padded_tokens",
    "request",
]

Layout = Literal["packed", "forked", "padded", "single"]
_SHORTEST = 4  # tokens of a beginning that is shared


@final
@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """One sequence to score: T input tokens, the targets ([T] or [T, K]), and which positions are needed (bool [T])."""

    tokens: Tensor
    targets: Tensor
    needed: Tensor

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.numel()


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences laid out for one forward.

    Attributes:
        tokens, positions: int64 [R, L].
        place: int64 [N]; where each token of the sequences, end to end, lies in the flattened rows.
    """

    tokens: Tensor
    positions: Tensor
    place: Tensor


def request(datum: Datum, only_trained: bool) -> ScoreRequest:
    """Say what of a datum must be scored; without ``target_tokens`` its own next tokens, T - 1 of them."""
    tokens, inputs = datum.model_input.tokens, datum.loss_fn_inputs
    if "target_tokens" in inputs:
        targets = inputs["target_tokens"].to_torch()
    else:
        tokens, targets = tokens[:-1], tokens[1:]
    needed = torch.ones(tokens.numel(), dtype=torch.bool)
    if only_trained and "weights" in inputs:
        weights = inputs["weights"].to_torch()
        needed = (weights != 0) if weights.dim() == 1 else (weights != 0).any(-1)
    return ScoreRequest(tokens, targets, needed)


def loss_units(loss: Loss, data: Sequence[Datum]) -> list[list[int]]:
    """Return the datums that must stay in one micro-batch: pairs, groups, the whole batch, or single datums."""
    if loss.gradient_kind == "batch":
        return [list(range(len(data)))]
    if loss.gradient_kind == "pair":
        if "pair_id" not in data[0].loss_fn_inputs:
            return [[i, i + 1] for i in range(0, len(data), 2)]
        return _by_id("pair_id", data)
    if loss.main_aggregation.local == "group":
        return _by_id("group_id", data)
    return [[i] for i in range(len(data))]


def _by_id(key: str, data: Sequence[Any]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for i, datum in enumerate(data):
        given = datum.loss_fn_inputs.get(key)
        found.setdefault(0 if given is None else int(as_tensor(given)), []).append(i)
    return list(found.values())


def micro_batches(
    units: Sequence[Sequence[int]], lengths: Sequence[int] | Mapping[int, int], budget: int, layout: Layout
) -> list[list[int]]:
    """Fill micro-batches of at most ``budget`` tokens with whole units, long ones first.

    A unit larger than the budget goes alone. ``single`` counts as packed: its sequences run one by one.
    """
    ordered = sorted(units, key=lambda unit: -max(lengths[i] for i in unit))
    batches: list[list[int]] = []
    for unit in ordered:
        if batches and _cost([*batches[-1], *unit], lengths, layout) <= budget:
            batches[-1].extend(unit)
        else:
            batches.append(list(unit))
    return batches


def _cost(batch: Sequence[int], lengths: Sequence[int] | Mapping[int, int], layout: Layout) -> int:
    return padded_tokens([lengths[i] for i in batch]) if layout == "padded" else sum(lengths[i] for i in batch)


def padded_tokens(lengths: Sequence[int]) -> int:
    """Tokens of the rectangle that holds sequences of these lengths."""
    return len(lengths) * max(lengths)


def forks(requests: Sequence[ScoreRequest]) -> list[tuple[int, int]]:
    """Return for each sequence the earlier one that it begins like, and how many first tokens they share (itself: 0).

    Its last token is always its own. A beginning of less than an eighth is not worth a fork.
    """
    first: dict[tuple[int, ...], int] = {}
    found = []
    for i, one in enumerate(requests):
        base = first.setdefault(tuple(one.tokens[:_SHORTEST].tolist()), i)
        size = min(requests[base].length, one.length - 1)
        differs = (requests[base].tokens[:size] != one.tokens[:size]).nonzero()
        shared = int(differs[0, 0]) if len(differs) else size
        worth = base != i and shared >= max(_SHORTEST, one.length // 8)
        found.append((base, shared) if worth else (i, 0))
    return found


def own_lengths(requests: Sequence[ScoreRequest], layout: Layout) -> list[int]:
    """Return the tokens that each sequence adds to a forward: all, or ``forked`` those after a shared beginning."""
    if layout != "forked":
        return [r.length for r in requests]
    return [r.length - shared for r, (_, shared) in zip(requests, forks(requests), strict=True)]


def arrange(requests: Sequence[ScoreRequest], layout: Layout, device: torch.device) -> Rows:
    """Lay sequences out: ``packed`` or ``forked`` in one row end to end, ``padded`` one per row, padding to the right.

    Right padding cannot reach earlier tokens of a causal model, so no mask is needed.
    """
    lengths = [r.length for r in requests]
    if layout == "forked":
        tokens, positions, place = _forked(requests)
    elif layout == "packed":
        tokens = torch.cat([r.tokens for r in requests])[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        place = torch.arange(tokens.numel())
    else:
        width = max(lengths)
        tokens = torch.zeros(len(requests), width, dtype=torch.int64)
        for row, r in enumerate(requests):
            tokens[row, : r.length] = r.tokens
        positions = torch.arange(width).expand(len(requests), width)
        place = torch.cat([torch.arange(n) + row * width for row, n in enumerate(lengths)])
    return Rows(tokens.to(device), positions.to(device), place.to(device))


def _forked(requests: Sequence[ScoreRequest]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay sequences end to end, each followed by the rest of those that begin like it; positions fall back to the fork."""
    found = forks(requests)
    order = sorted(range(len(requests)), key=lambda i: (found[i][0], i))
    starts: dict[int, int] = {}
    places: dict[int, Tensor] = {}
    tokens, positions, end = [], [], 0
    for i in order:
        (base, shared), one = found[i], requests[i]
        starts.setdefault(base, end)
        own = torch.arange(end, end + one.length - shared)
        places[i] = torch.cat([torch.arange(starts[base], starts[base] + shared), own])
        tokens.append(one.tokens[shared:])
        positions.append(torch.arange(shared, one.length))
        end += len(own)
    return torch.cat(tokens)[None], torch.cat(positions)[None], torch.cat([places[i] for i in range(len(requests))])
