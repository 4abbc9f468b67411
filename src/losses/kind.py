"""What a token's gradient really depends on, measured: a declared gradient kind is checked before a fast path relies on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import GradientKind, Loss
from .batch.token_batch import TokenBatch

__all__ = ["check_declared", "dependence", "measured_kind", "trusted_kind", "wider"]

_ORDER: Final[tuple[GradientKind, ...]] = get_args(GradientKind)
_OWN: Final = __name__.rpartition(".")[0] + "."  # this package's losses are measured by its tests
_LENGTHS: Final = (2, 1, 3, 2)  # neighbours are pairs
_NOISE: Final = 1e-6  # a gradient that changes by less, relative to the largest one, has not changed


def wider(a: GradientKind, b: GradientKind) -> bool:
    """Return whether kind ``a`` allows for everything that ``b`` does."""
    return _ORDER.index(a) >= _ORDER.index(b)


def dependence(
    gradient: Callable[[Tensor], Tensor],
    rows: Sequence[int],
    point: Tensor,
    moves: Sequence[float],
) -> GradientKind:
    """Return the narrowest kind that explains which log-probs each entry of a gradient depends on.

    Every log-prob is moved by itself, and what changes is looked at: the structure of the Jacobian, without its values.

    Args:
        gradient: from log-probs, float64 [N], to dL/dlogprob, [N].
        rows: the sequence of each token; 2i and 2i + 1 are a pair.
        point: the log-probs, [N], from which is moved.
        moves: by how much, nats.
    """
    found: GradientKind = "constant"
    base = gradient(point)
    for j in range(point.numel()):
        for move in moves:
            moved = point.clone()
            moved[j] += move
            for i in _changed(base, gradient(moved)):
                found = max(found, _relation(i, j, rows), key=_ORDER.index)
    return found


def measured_kind(loss: Loss) -> GradientKind:
    """Return the kind of a loss, measured on fixed random numbers in fp64.

    Raises:
        Exception: whatever the loss raises on them.
    """
    generator = torch.Generator().manual_seed(0)
    size = sum(_LENGTHS)
    rows = [i for i, length in enumerate(_LENGTHS) for _ in range(length)]

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)

    point, inputs = draw(-3.0, -1.0), _inputs(draw)

    def gradient(at: float) -> Callable[[Tensor], Tensor]:
        """Return the gradient as a function of the log-probs, with anchors ``at`` times their distance from the policy."""
        anchors = {name: point + at * inputs[name] for name in ("rollout_logprobs", "old_logprobs")}
        return lambda x: _gradient(loss, x, {**inputs, **anchors, "ref_logprobs": point + inputs["ref_logprobs"]})

    on_policy = dependence(gradient(0.0), rows, point, (1e-4,))  # within every clip range, however narrow
    return max(on_policy, dependence(gradient(1.0), rows, point, (0.05, -0.7)), key=_ORDER.index)


def trusted_kind(loss: Loss) -> GradientKind:
    """Return the kind that a fast path may rely on: the declared one if measuring bears it out, else ``batch``.

    A loss of another package is measured when it is first used, and a warning says so where it is not what it declares,
    or cannot be measured. Then it runs as ``batch``, which is right for every loss.
    """
    if type(loss).__module__.startswith(_OWN):
        return loss.gradient_kind
    try:
        return _verified(loss)
    except TypeError:  # not hashable
        return _verified.__wrapped__(loss)


def check_declared(loss: type) -> None:
    """Measure a loss class that is being registered, where it can be made without arguments.

    Raises:
        ConfigError: its gradient depends on more than it declares.
    """
    if not (isinstance(loss, type) and issubclass(loss, Loss)) or loss.__module__.startswith(_OWN):
        return
    try:
        default = loss()
        kind = measured_kind(default)
    except Exception:  # it has no defaults, or refuses these numbers: it is measured where it is first used
        return
    if not wider(default.gradient_kind, kind):
        raise ConfigError(_mismatch(default, kind))


@lru_cache(maxsize=256)
def _verified(loss: Loss) -> GradientKind:
    declared = loss.gradient_kind
    if declared == "batch":
        return declared
    try:
        kind = measured_kind(loss)
    except Exception as error:
        reason = f"{loss.name} declares gradient kind {declared!r}, which could not be measured ({error})"
        warnings.warn(f"{reason}: it runs as 'batch'", stacklevel=3)
        return "batch"
    if wider(declared, kind):
        return declared
    warnings.warn(f"{_mismatch(loss, kind)}; until then it runs as 'batch'", stacklevel=3)
    return "batch"


def _mismatch(loss: Loss, kind: GradientKind) -> str:
    words = {
        "token": "its own log-prob",
        "sequence": "other log-probs of its sequence",
        "pair": "log-probs of its pair",
        "batch": "log-probs of other sequences",
    }
    return (
        f"{loss.name} declares gradient kind {loss.gradient_kind!r}, but the gradient of a token depends on "
        f"{words[kind]}: declare gradient_kind = {kind!r}"
    )


def _inputs(draw: Callable[[float, float], Tensor]) -> dict[str, Tensor]:
    # One advantage per sequence, as some losses want it.
    first = [sum(_LENGTHS[:i]) for i, length in enumerate(_LENGTHS) for _ in range(length)]
    numbers = {
        "weights": draw(0.5, 2.0),
        "advantages": draw(-2.0, 2.0)[first],
        "rollout_logprobs": draw(-0.1, 0.1),
        "old_logprobs": draw(-0.1, 0.1),
        "ref_logprobs": draw(-0.5, 0.5),
        "sequence_ratio_mask": torch.ones(sum(_LENGTHS), dtype=torch.float64),
    }
    units = {"pair_id": [0, 0, 1, 1], "role": [1, 0, 1, 0], "group_id": [0, 0, 1, 1], "label": [1, 0, 1, 0]}
    given = {name: torch.tensor(ids) for name, ids in units.items()}
    return {**numbers, **given, "reference_point": torch.full((4,), 0.25, dtype=torch.float64)}


def _gradient(loss: Loss, logprobs: Tensor, inputs: dict[str, Any]) -> Tensor:
    with torch.enable_grad():
        leaf = logprobs.detach().clone().requires_grad_()
        value = loss.evaluate(TokenBatch.from_packed(leaf, list(_LENGTHS), **inputs)).loss
        (slope,) = torch.autograd.grad(value, leaf)
    return slope


def _changed(before: Tensor, after: Tensor) -> list[int]:
    size = float(torch.maximum(before.abs(), after.abs()).max())
    # A NaN counts as a change: the comparison is turned around.
    return (~((after - before).abs() <= _NOISE * size)).nonzero().flatten().tolist()


def _relation(i: int, j: int, rows: Sequence[int]) -> GradientKind:
    if i == j:
        return "token"
    if rows[i] == rows[j]:
        return "sequence"
    return "pair" if rows[i] // 2 == rows[j] // 2 else "batch"
