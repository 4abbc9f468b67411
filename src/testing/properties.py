"""Properties that every loss must have; run them on your own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses.base import Loss, LossOutput
from .cases import Case
from .oracles import finite_differences

__all__ = ["check_loss", "cotangent"]


def cotangent(loss: Loss, case: Case) -> tuple[LossOutput, list[Tensor]]:
    """Return a loss's output and dL/dlogprob, one tensor per sequence."""
    batch, leaf = case.batch()
    output = loss.evaluate(batch)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, list(torch.split(gradient, [len(s.logprobs) for s in case.sequences]))


def check_loss(loss: Loss, case: Case, *, differences: bool = True) -> None:
    """Hold ``loss`` to its contract on ``case``.

    The gradient is that of the value (central differences, unless ``differences`` is off: detached parts and kinks have
    none); untrained positions have exactly zero gradient, even where they hold NaN; padded, packed and listed forms
    agree; swapping whole pairs swaps the results; metrics are there.

    Raises:
        AssertionError: says which property fails.
    """
    output, found = cotangent(loss, case)
    assert bool(torch.isfinite(output.loss)), f"{loss.name}: the loss is {output.loss.item()}"
    assert "metrics_failed" not in output.metrics, f"{loss.name}: computing the metrics failed"
    _check_untrained(loss, case, found)
    _check_forms(loss, case, output, found)
    _check_order(loss, case, output, found)
    if differences:
        _check_differences(loss, case, found)


def _check_untrained(loss: Loss, case: Case, found: Sequence[Tensor]) -> None:
    for i, (s, gradient) in enumerate(zip(case.sequences, found, strict=True)):
        for j, w in enumerate(s.weights):
            got = float(gradient[j])
            assert math.isfinite(got), f"{loss.name}: gradient {got} at sequence {i}, token {j}"
            assert w != 0 or got == 0.0, f"{loss.name}: untrained token {j} of sequence {i} has gradient {got}"


def _check_forms(loss: Loss, case: Case, output: LossOutput, found: Sequence[Tensor]) -> None:
    for left in (False, True):
        batch, leaves = case.padded(left)
        padded = loss.evaluate(batch).loss
        _same(loss, f"padded (left={left})", output.loss, padded, found, torch.autograd.grad(padded, leaves))
    data, leaves = case.datums()
    value, _ = loss(data, leaves)
    # Datums carry fp32 inputs, so the numbers themselves are rounded.
    _same(loss, "list of datums", output.loss, value, found, torch.autograd.grad(value, leaves), 1e-4)


def _check_order(loss: Loss, case: Case, output: LossOutput, found: Sequence[Tensor]) -> None:
    pairs = range(len(case.sequences) // 2)
    order = [i for p in reversed(pairs) for i in (2 * p, 2 * p + 1)]
    other, permuted = cotangent(loss, case.subset(order))
    _same(loss, "reordered", output.loss, other.loss, [found[i] for i in order], permuted)


def _check_differences(loss: Loss, case: Case, found: Sequence[Tensor]) -> None:
    batch, leaf = case.batch()
    flat = leaf.detach().tolist()
    places = [k for k, x in enumerate(flat) if bool(batch.trained[k]) and math.isfinite(x)]

    def value(at: list[float]) -> float:
        moved, target = case.batch()
        with torch.no_grad():
            target[torch.tensor(places)] = torch.tensor(at, dtype=torch.float64)
        return float(loss.evaluate(moved).loss.detach())

    expected = finite_differences(value, [flat[k] for k in places])
    got = torch.cat(list(found))[torch.tensor(places)].tolist()
    for k, want, have in zip(places, expected, got, strict=True):
        tolerance = 1e-5 * max(1.0, abs(want))
        assert abs(want - have) <= tolerance, f"{loss.name}: token {k} has gradient {have}, differences say {want}"


def _same(
    loss: Loss, form: str, a: Tensor, b: Tensor, x: Sequence[Tensor], y: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    assert math.isclose(a.item(), b.item(), rel_tol=tolerance, abs_tol=tolerance), (
        f"{loss.name}, {form}: loss {b.item()} instead of {a.item()}"
    )
    difference = float((torch.cat(list(x)) - torch.cat(list(y))).norm())
    size = float(torch.cat(list(x)).norm())
    assert difference <= tolerance * max(size, 1.0), f"{loss.name}, {form}: the gradient differs by {difference}"
