"""Log-probs where each process has positions of its own, and some rows of the head: hidden states are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import PullbackError, RanksDifferError
from .head import Head
from .logprobs import flatten
from .vocab_parallel import DTYPES, require_told_dtype, vocab_parallel_logprobs

__all__ = ["Positions", "exchange_bytes", "own_positions_logprobs"]

# Bytes: what ranks tell of their positions, and are asked; a token; a sum in fp64.
_SAID, _ASKED, _ID, _SUM = 48, 120, 8, 16


@final
@dataclass(frozen=True)
class Positions:
    """What one process has scored.

    Attributes:
        count: positions.
        candidates: K, targets of each.
        temperature: that divides their logits.
    """

    count: int
    candidates: int = 1
    temperature: float = 1.0

    @property
    def targets(self) -> int:
        """Of all positions."""
        return self.count * self.candidates

    @property
    def kind(self) -> tuple[float, int]:
        """Positions of one kind are scored together."""
        return self.temperature, self.candidates


def own_positions_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    temperature: float = 1.0,
    memory_budget: int | None = None,
) -> Tensor:
    """Log-prob of each target token where both positions and the rows of the head are dealt out to processes.

    Hidden states and targets of all ranks are gathered, scored by `vocab_parallel_logprobs` together, and each rank keeps the
    log-probs of its own; backward, the cotangents are gathered. So the gradient of a rank's rows is that of the sum of all
    ranks' losses, and needs no reduction. Bytes received: see `exchange_bytes`. Every rank must call this as often as the
    others, also with no positions at all, and go backward in the same order.

    Args:
        hidden: [..., H], this rank's.
        head: this rank's rows of the output projection.
        targets: int64 [...] or [..., K], ids of the whole vocabulary. Ranks may differ in the number of positions and in K.
        group: the ranks, in the order of their rows; None: all.
        temperature: divides the logits of this rank's positions.
        memory_budget: bytes of logits held at once; default as for `selected_logprobs`.

    Returns:
        Log-probs in nats, shape of ``targets``, fp32 (fp64 for an fp64 head).

    Raises:
        ShapeError, ConfigError, UnsupportedError: as for `vocab_parallel_logprobs`.
        RanksDifferError: ranks have hidden states of another dtype or width, or one was refused what it asked.
    """
    whole = head._replace(group=None)
    try:
        flat, chosen, _ = flatten(hidden, whole, targets, None, bounded=False)
        require_told_dtype(flat, whole)
        refused: PullbackError | None = None
    except PullbackError as error:
        flat, chosen, refused = hidden, targets, error
    ranks = _tell(flat, chosen, temperature, refused, group)
    counts = [each.count for each in ranks]
    place = _slice(counts, dist.get_rank(group))
    every = _Gathered.apply(flat, counts, place, group)  # type: ignore[no-untyped-call]
    ids = _gather(chosen.reshape(-1), [each.targets for each in ranks], group)
    parts, kinds = [], sorted({each.kind for each in ranks})
    for kind in kinds:
        members = [r for r, each in enumerate(ranks) if each.kind == kind]
        rows = every if len(kinds) == 1 else torch.cat([every[_slice(counts, r)] for r in members])
        asked = torch.cat([ids[r] for r in members]).reshape(-1, kind[1])
        scored = vocab_parallel_logprobs(rows, whole, asked, group, temperature=kind[0], memory_budget=memory_budget)
        parts.append(scored.reshape(-1))
    own: Tensor = _Own.apply(ranks, group, *parts)  # type: ignore[no-untyped-call]
    return own.reshape(targets.shape)


def exchange_bytes(
    ranks: Sequence[Positions], width: int, bytes_each: int, weight_each: int, *, backward: bool = True
) -> float:
    """Return the bytes that each of n processes receives in `own_positions_logprobs`.

    With M_r positions and K_r targets of each on rank r, hidden states of width H and e bytes a number, w bytes a number of the
    weight, but at least 4; and with N positions of each kind, those of one temperature and one K::

        forward     (n - 1) (48 + e H max M_r + 8 max M_r K_r) + sum over kinds of (n - 1) (120 + 16 N (3 + K) / n)
        backward    (n - 1) w max M_r K_r                      + sum over kinds of 2 w N H (n - 1) / n

    Args:
        ranks: what each has.
        width: H.
        bytes_each: e.
        weight_each: w.
        backward: count it too.
    """
    others, wide = len(ranks) - 1, max(4, weight_each)
    most = max(each.targets for each in ranks)
    received = float(others * (_SAID + bytes_each * width * max(each.count for each in ranks) + _ID * most))
    received += others * wide * most if backward else 0
    for temperature, candidates in {each.kind for each in ranks}:
        count = sum(each.count for each in ranks if each.kind == (temperature, candidates))
        received += others * (_ASKED + _SUM * count * (3 + candidates) / len(ranks))
        received += 2 * wide * count * width * others / len(ranks) if backward else 0
    return received


def _tell(
    hidden: Tensor, targets: Tensor, temperature: float, refused: PullbackError | None, group: dist.ProcessGroup | None
) -> list[Positions]:
    """Return what each rank has, as all of them say it.

    Raises:
        RanksDifferError: a rank was refused, or has hidden states of another kind.
        PullbackError: this rank was refused.
    """
    told = [0.0] * 5
    if refused is None:
        width, dtype = float(hidden.shape[-1]), float(DTYPES.index(hidden.dtype))
        told = [float(len(hidden)), float(targets.shape[1]), temperature, width, dtype]
    own = torch.tensor([float(refused is not None), *told], dtype=torch.float64, device=hidden.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    if refused is not None:
        raise refused
    said = [each.tolist() for each in every]
    for rank, each in enumerate(said):
        if each[0]:
            raise RanksDifferError(
                f"rank {rank} was refused its part of own_positions_logprobs; its own error says why"
            )
        if each[4:] != said[0][4:]:
            raise RanksDifferError(
                f"rank {rank} has hidden states of width {each[4]:g} in {DTYPES[int(each[5])]}, rank 0 of width "
                f"{said[0][4]:g} in {DTYPES[int(said[0][5])]}; every rank must run the same model"
            )
    return [Positions(int(each[1]), int(each[2]), each[3]) for each in said]


class _Gathered(torch.autograd.Function):
    """Hidden states of all ranks; backward, this rank's rows of a gradient that all ranks have summed already."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], place: slice, group: dist.ProcessGroup | None) -> Tensor:
        """Gather."""
        ctx.place = place
        return torch.cat(_gather(own, counts, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        """Keep this rank's."""
        return cotangent[ctx.place], None, None, None


class _Own(torch.autograd.Function):
    """This rank's log-probs of those of all ranks, which lie apart by kind; backward, the cotangents of all ranks."""

    @staticmethod
    def forward(ctx: Any, ranks: list[Positions], group: dist.ProcessGroup | None, *parts: Tensor) -> Tensor:
        """Keep this rank's."""
        ctx.ranks, ctx.group = ranks, group
        rank, kinds = dist.get_rank(group), sorted({each.kind for each in ranks})
        same = [each.targets if each.kind == ranks[rank].kind else 0 for each in ranks]
        return parts[kinds.index(ranks[rank].kind)][_slice(same, rank)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        """Gather."""
        every = _gather(cotangent, [each.targets for each in ctx.ranks], ctx.group)
        kinds = sorted({each.kind for each in ctx.ranks})
        apart = [[g for g, each in zip(every, ctx.ranks, strict=True) if each.kind == kind] for kind in kinds]
        return None, None, *map(torch.cat, apart)


def _gather(own: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return the tensors of all ranks, whose first dimension has ``counts[r]`` entries on rank r."""
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own
    every = [torch.empty_like(padded) for _ in counts]
    if padded.numel():
        dist.all_gather(every, padded, group=group)
    return [each[:count] for each, count in zip(every, counts, strict=True)]


def _slice(counts: Sequence[int], rank: int) -> slice:
    """Return where one rank's entries lie when those of all are end to end."""
    end = [*accumulate(counts)][rank]
    return slice(end - counts[rank], end)
