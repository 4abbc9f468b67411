"""Which sequences belong together: preference pairs and prompt groups, found without looking at a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from ...errors import ConfigError, IncompleteUnitError
from ..checks import choice
from .keys import ROLE_CHOSEN, ROLE_GOLD, ROLE_REJECTED
from .problems import Problem
from .selection import readable

__all__ = ["Groups", "PairOrder", "Pairs", "group_sequences", "pair_inputs", "pair_sequences", "require_even"]

PairOrder = Literal["interleaved", "stacked"]


class Pairs(NamedTuple):
    """Sequence indices of the preference pairs: ``chosen[p]`` is preferred to ``rejected[p]``. Both int64 [P]."""

    chosen: Tensor
    rejected: Tensor


@final
@dataclass(frozen=True, eq=False)
class Groups:
    """Prompt groups: ``index[b]``, int64 [B], is the group of sequence b, from 0; ``count`` is how many there are, 0-d."""

    index: Tensor
    count: Tensor


def pair_sequences(
    sequences: int, pair_id: Tensor | None, role: Tensor | None, device: torch.device
) -> tuple[Pairs, Problem | None]:
    """Return the pairs, and what may be wrong with them.

    Without ``pair_id`` neighbours are pairs; without ``role`` too the first of them (2i) is the chosen one. Sequences of
    the gold role take part in no pair; on a device their number is unknown, so there they are a problem.

    Args:
        sequences: B.
        pair_id, role: int64 [B], or None.
        device: of the log-probs.

    Raises:
        IncompleteUnitError: an odd number of sequences, or ``pair_id`` without ``role``.
    """
    if role is None:
        if pair_id is not None:
            raise IncompleteUnitError(
                "pair_id is given without role; give role 1 to chosen and 0 to rejected sequences"
            )
        require_even(sequences)
        order = torch.arange(0, sequences, 2, device=device)
        return Pairs(order, order + 1), None
    order = torch.arange(sequences, device=device)
    if pair_id is None:
        pair_id = order // 2
    if readable(role):
        order = order[role != ROLE_GOLD]
        _require_whole(pair_id[order], role[order])
    require_even(order.shape[0])
    order = order[(role[order] != ROLE_CHOSEN).to(torch.int8).argsort(stable=True)]
    pairs = order[pair_id[order].argsort(stable=True)].view(-1, 2)
    chosen, rejected = pairs.unbind(1)
    wrong = (
        (pair_id[chosen] != pair_id[rejected]) | (role[chosen] != ROLE_CHOSEN) | (role[rejected] != ROLE_REJECTED)
    ).any()
    ids, roles = pair_id, role
    return Pairs(chosen, rejected), Problem(wrong, lambda: _broken(ids, roles))


def pair_inputs(
    order: PairOrder | Tensor | None, sequences: int, device: torch.device, given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return ``pair_id`` and ``role`` of pairs that lie in an order; nothing where they are neighbours anyway.

    Args:
        order: of the pairs; None: the caller says nothing of it. (A tensor is refused; the type lets a caller unpack a
            ``dict[str, Tensor]`` of inputs.)
        sequences: B.
        device: of the log-probs.
        given: the inputs that the caller gave.

    Raises:
        ConfigError: the order is unknown, or said twice.
        IncompleteUnitError: an odd number of sequences.
    """
    if order is None:
        return {}
    choice("pairs", order, get_args(PairOrder))
    twice = [name for name in ("pair_id", "role") if given.get(name) is not None]
    if twice:
        raise ConfigError(f"pairs={order!r} says which sequences are pairs, and so does {twice[0]}: give one of them")
    require_even(sequences)
    if order == "interleaved":
        return {}
    position = torch.arange(sequences, device=device)
    chosen = position < sequences // 2
    return {
        "pair_id": position % max(1, sequences // 2),
        "role": torch.where(chosen, ROLE_CHOSEN, ROLE_REJECTED),
    }


def group_sequences(sequences: int, group_id: Tensor | None, device: torch.device) -> Groups:
    """Number the prompt groups densely; without ``group_id`` all sequences are one group."""
    if group_id is None:
        return Groups(torch.zeros(sequences, dtype=torch.int64, device=device), torch.ones((), device=device))
    order = group_id.argsort(stable=True)
    ordered = group_id[order]
    rank = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).to(torch.int64).cumsum(0)])[:sequences]
    return Groups(torch.zeros_like(rank).scatter(0, order, rank), rank[-1:].sum() + min(1, sequences))


def require_even(sequences: int) -> None:
    """Check that neighbours make whole pairs.

    Raises:
        IncompleteUnitError: the last sequence has no partner.
    """
    if sequences % 2:
        raise IncompleteUnitError(
            f"{sequences} sequences do not make whole pairs (2i chosen, 2i + 1 rejected): sequence {sequences - 1} "
            "has no partner; add it, or give pair_id and role"
        )


def _require_whole(pair_id: Tensor, role: Tensor) -> None:
    """Check that every pair has one sequence of each role.

    Raises:
        IncompleteUnitError: names the pairs that lack a side, or have one twice.
    """
    ids, index = torch.unique(pair_id, return_inverse=True)
    for side, name in ((ROLE_CHOSEN, "chosen"), (ROLE_REJECTED, "rejected")):
        count = torch.zeros_like(ids).index_add(0, index, (role == side).to(ids.dtype))
        if bool((count != 1).any()):
            wrong = dict(zip(ids[count != 1].tolist(), count[count != 1].tolist(), strict=True))
            raise IncompleteUnitError(f"a pair has exactly one {name} sequence in a call; by pair_id: {wrong}")


def _broken(pair_id: Tensor, role: Tensor) -> IncompleteUnitError:
    try:
        _require_whole(pair_id.cpu(), role.cpu())
    except IncompleteUnitError as error:
        return error
    return IncompleteUnitError("gold sequences on a device: give a loss of pairs the chosen and rejected ones only")
