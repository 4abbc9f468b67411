"""Micro-batches: which sequences go through the model together, and in which layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from ...calls.requests import ScoreRequest

__all__ = [
    "Layout",
    "MicroBatch",
    "Rows",
    "TargetIndex",
    "arrange",
    "forks",
    "micro_batches",
    "own_lengths",
    "padded_tokens",
]

Layout = Literal["packed", "forked", "padded", "single"]
_SHORTEST = 4  # tokens of a shared prefix
_NOBODY = -1  # the datum of a dummy


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


@final
@dataclass(frozen=True, eq=False)
class TargetIndex:
    """Which positions of a micro-batch are scored, and on which tokens.

    Attributes:
        targets: int64 [M] or [M, K], of the needed positions.
        at: int64 [M]; their places among the N positions of the micro-batch.
        shape: of all targets, [N] or [N, K].
    """

    targets: Tensor
    at: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, requests: Sequence[ScoreRequest], device: torch.device) -> TargetIndex:
        """Collect the needed positions of sequences, end to end."""
        needed = torch.cat([r.needed for r in requests]).to(device)
        targets = torch.cat([r.targets for r in requests]).to(device)
        return cls(targets[needed], needed.nonzero()[:, 0], tuple(targets.shape))

    def scatter(self, logprobs: Tensor) -> Tensor:
        """Put log-probs of the needed positions among zeros, [N] or [N, K]."""
        return logprobs.new_zeros(self.shape).index_put((self.at,), logprobs)


@final
@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Sequences that go through the model together, laid out once for all their forwards.

    Attributes:
        members: datum indices.
        lengths: tokens of each.
        rows: as the model takes them; several where sequences run one by one.
        index: the positions that are scored.
        tokens: that go through the model, padding left out and a shared prefix counted once.
        temperature: at which all of them are scored.
        most_tokens: of the forwards that other processes run at the same time; 0: there are none.
    """

    members: Sequence[int]
    lengths: Sequence[int]
    rows: Sequence[Rows]
    index: TargetIndex
    tokens: int
    temperature: float = 1.0
    most_tokens: int = 0

    @classmethod
    def of(
        cls,
        requests: Sequence[ScoreRequest],
        layout: Layout,
        device: torch.device,
        members: Sequence[int] | None = None,
        most_tokens: int = 0,
    ) -> MicroBatch:
        """Lay sequences out, which are scored at one temperature."""
        alone = layout == "single"
        rows = [arrange([r], "padded", device) for r in requests] if alone else [arrange(requests, layout, device)]
        return cls(
            members=range(len(requests)) if members is None else members,
            lengths=[r.length for r in requests],
            rows=rows,
            index=TargetIndex.of(requests, device),
            tokens=sum(own_lengths(requests, layout)),
            temperature=requests[0].temperature,
            most_tokens=most_tokens,
        )

    @classmethod
    def dummy(cls, device: torch.device, most_tokens: int) -> MicroBatch:
        """Return a forward of two tokens that stand for no datum: a process with nothing to do keeps step with the others."""
        tokens = torch.zeros(2, dtype=torch.int64)
        request = ScoreRequest(tokens, tokens, torch.tensor([True, False]))
        return cls.of([request], "padded", device, [_NOBODY], most_tokens)

    @property
    def stands_for_none(self) -> bool:
        """Whether it is a dummy."""
        return list(self.members) == [_NOBODY]

    def apart(self, values: Tensor) -> dict[int, Tensor]:
        """Return values of all positions, end to end, by datum index."""
        return dict(zip(self.members, torch.split(values, list(self.lengths)), strict=True))


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

    Its last token is always its own. A shared prefix of less than an eighth is not worth a fork.
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
    """Return the tokens that each sequence adds to a forward: all, or ``forked`` those after a shared prefix."""
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
