"""Moves of a batch under which a gradient may have to stay the same, and which of them a loss is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ..cases import Case, CaseSequence

__all__ = ["INVARIANCES", "MOVES", "centred", "differs", "invariances_of", "unweighted"]

INVARIANCES: Final = ("anchors", "pair", "group")
_ANCHORS: Final = ("rollout_logprobs", "old_logprobs", "ref_logprobs")
_ORDINARY: Final = (-0.375, -2.0)  # nats
_NEARBY: Final = (-1.0, -0.4, -0.05, 0.0, 0.05, 0.4)  # nats, of an anchor
_LOOSE: Final = (
    1e-3  # of the largest gradient; an epsilon of 1e-8 beside a probability is not seen at ordinary log-probs
)


class DeclaredInputs(Protocol):
    """What a loss under test says of its inputs, and how it is evaluated."""

    @property
    def invariant(self) -> tuple[str, ...] | None: ...

    @property
    def fields(self) -> tuple[str, ...]: ...

    @property
    def paired(self) -> bool: ...

    @property
    def relative(self) -> bool: ...

    @property
    def grouped(self) -> bool: ...

    @property
    def against_reference(self) -> bool: ...

    def measure(self, case: Case) -> Any: ...


def _anchors(case: Case, by: float) -> Case:
    """Take nats from the policy's log-prob of each token and from all that it is compared with."""
    for name in ("logprobs", *_ANCHORS):
        case = case.edited(name, lambda i, j, x: x + by * (1 + (i + j) % 2))
    return case


def _sums(case: Case, by: float) -> Case:
    """Take nats from the summed log-probs of both responses of a pair, and half as many from the reference's."""
    return _sides(case, by, lambda s, j: float(j == s.trained()[0]))


def _means(case: Case, by: float) -> Case:
    """Take nats from the mean log-probs of both responses of a pair, and half as many from the reference's."""
    return _sides(case, by, lambda s, j: 1.0)


def _sides(case: Case, by: float, share: Callable[[CaseSequence, int], float]) -> Case:
    sequences = case.sequences
    for name, nats in (("logprobs", by), ("ref_logprobs", 0.5 * by)):

        def moved(i: int, j: int, x: float, nats: float = nats) -> float:
            return x + nats * (1 + i // 2) * share(sequences[i], j) if sequences[i].weights[j] else x

        case = case.edited(name, moved)
    return case


def _groups(case: Case, by: float) -> Case:
    """Add one number to all rewards of a group, another for each group."""
    groups = [s.group for s in case.sequences]
    return case.edited("advantages", lambda i, j, x: x + by * (1 + groups[i]))


def _batch(case: Case, by: float) -> Case:
    """Add one number to all rewards."""
    return case.edited("advantages", lambda i, j, x: x + by)


MOVES: Final[Mapping[str, Callable[[Case, float], Case]]] = {
    "anchors": _anchors,
    "level": _anchors,  # of a loss that compares with nothing
    "pair sums": _sums,
    "pair means": _means,
    "group": _groups,
    "batch": _batch,
}


def invariances_of(loss: DeclaredInputs) -> tuple[str, ...]:
    """Return the moves that may not change the gradient of a loss: as declared, or as its inputs and its gradient tell.

    Sums of chosen and rejected that come with those of a reference, and rewards that come with their groups, leave no choice.
    Of other losses it is measured at ordinary log-probs, where those that use probabilities by themselves (DPPO, ORPO) show it.
    """
    if loss.invariant is not None:
        return tuple(_variant(loss, name) for name in INVARIANCES if name in loss.invariant)
    moves = ["group"] if loss.relative and loss.grouped else []
    if loss.against_reference or _holds(loss, "anchors"):
        moves.append("anchors" if {*_ANCHORS} & {*loss.fields} else "level")
    if loss.paired:
        moves += [name for name in ("pair sums", "pair means") if _holds(loss, name)][:1]
    return tuple(moves)


def centred(case: Case) -> list[float]:
    """Return the reward of each sequence, that of its first trained token, less the mean of its group."""
    rewards = [s.advantages[(s.trained() or [0])[0]] for s in case.sequences]
    groups = [s.group for s in case.sequences]
    return [
        r - sum(x for x, h in zip(rewards, groups, strict=True) if h == g) / groups.count(g)
        for r, g in zip(rewards, groups, strict=True)
    ]


def unweighted(case: Case) -> Case:
    """Return the case with weights of 1, so that sums and means are those of a mask."""
    return case.edited("weights", lambda i, j, w: float(w != 0))


def differs(before: Tensor, after: Tensor, tolerance: float) -> Tensor:
    """Return where two gradients differ by more than a share of the largest entry; NaN differs from everything."""
    size = max(1e-3, float(before.abs().nan_to_num().max()))
    return ~((before - after).abs() <= tolerance * size)


def _variant(loss: DeclaredInputs, name: str) -> str:
    if name == "pair":
        return "pair means" if _holds(loss, "pair means") else "pair sums"
    return "batch" if name == "group" and not loss.grouped else name


def _holds(loss: DeclaredInputs, name: str) -> bool:
    """Return whether a move changes nothing at ordinary log-probs."""
    try:
        for case in _ordinary_cases():
            base = loss.measure(case).flat
            for by in _ORDINARY:
                if bool(differs(base, loss.measure(MOVES[name](case, by)).flat, _LOOSE).any()):
                    return False
    except Exception:  # it refuses these numbers: nothing is known
        return False
    return True


@cache
def _ordinary_cases() -> tuple[Case, ...]:
    """Return pairs of log-probs from likely to unlikely, with anchors nearby and up to a nat away, on both sides."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int, numbers: tuple[float, ...]) -> list[float]:
        return [numbers[k] for k in torch.randint(len(numbers), (length,), generator=generator).tolist()]

    def sequence(i: int) -> CaseSequence:
        length = 3 + i % 3
        at = draw(length, (-0.02, -0.05, -0.1, -0.3, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0))
        near = [[min(x + d, -0.01) for x, d in zip(at, draw(length, _NEARBY), strict=True)] for _ in range(3)]
        advantages = draw(length, (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0))
        return CaseSequence(at, [1.0] * length, advantages, near[0], near[1], near[2], i // 2, i // 2, 1 - i % 2)

    return tuple(Case(tuple(sequence(i) for i in range(4)), with_old=True) for _ in range(4))
