"""Properties that every loss has. Run them on your own loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses.base import Loss
from ..losses.output import LossOutput
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
    """Check the contract of a loss on one case.

    The gradient equals the central differences of the value (switch ``differences`` off for losses with detached parts or
    kinks, where they do not apply). Untrained positions have exactly zero gradient, even if they hold NaN. Padded batches,
    packed batches and lists of datums agree. Reordering pairs reorders the gradients. The metrics can be computed.

    Raises:
        AssertionError: says which property fails.
    """
    output, gradients = cotangent(loss, case)
    assert bool(torch.isfinite(output.loss)), f"{loss.name}: the loss is {output.loss.item()}"
    assert "metrics_failed" not in output.metrics, f"{loss.name}: computing the metrics failed"
    _check_untrained(loss, case, gradients)
    _check_forms(loss, case, output, gradients)
    _check_order(loss, case, output, gradients)
    if differences:
        _check_differences(loss, case, gradients)


def _check_untrained(loss: Loss, case: Case, gradients: Sequence[Tensor]) -> None:
    for i, (s, gradient) in enumerate(zip(case.sequences, gradients, strict=True)):
        for j, w in enumerate(s.weights):
            value = float(gradient[j])
            assert math.isfinite(value), f"{loss.name}: gradient {value} at sequence {i}, token {j}"
            assert w != 0 or value == 0.0, f"{loss.name}: untrained token {j} of sequence {i} has gradient {value}"


def _check_forms(loss: Loss, case: Case, output: LossOutput, gradients: Sequence[Tensor]) -> None:
    for left in (False, True):
        batch, leaves = case.padded(left)
        padded = loss.evaluate(batch).loss
        _same(loss, f"padded (left={left})", output.loss, padded, gradients, torch.autograd.grad(padded, leaves))
    data, leaves = case.datums()
    value, _ = loss(data, leaves)
    # Datums carry fp32 inputs, so the numbers themselves are rounded.
    _same(loss, "list of datums", output.loss, value, gradients, torch.autograd.grad(value, leaves), 1e-4)


def _check_order(loss: Loss, case: Case, output: LossOutput, gradients: Sequence[Tensor]) -> None:
    pairs = range(len(case.sequences) // 2)
    order = [i for p in reversed(pairs) for i in (2 * p, 2 * p + 1)]
    other, permuted = cotangent(loss, case.subset(order))
    _same(loss, "reordered", output.loss, other.loss, [gradients[i] for i in order], permuted)


def _check_differences(loss: Loss, case: Case, gradients: Sequence[Tensor]) -> None:
    batch, leaf = case.batch()
    flat = leaf.detach().tolist()
    positions = [k for k, x in enumerate(flat) if bool(batch.trained[k]) and math.isfinite(x)]

    def value(at: list[float]) -> float:
        moved, target = case.batch()
        with torch.no_grad():
            target[torch.tensor(positions)] = torch.tensor(at, dtype=torch.float64)
        return float(loss.evaluate(moved).loss.detach())

    expected = finite_differences(value, [flat[k] for k in positions])
    actual = torch.cat(list(gradients))[torch.tensor(positions)].tolist()
    for k, slope, gradient in zip(positions, expected, actual, strict=True):
        tolerance = 1e-5 * max(1.0, abs(slope))
        assert abs(slope - gradient) <= tolerance, (
            f"{loss.name}: token {k} has gradient {gradient}, differences say {slope}"
        )


def _same(
    loss: Loss,
    form: str,
    expected: Tensor,
    actual: Tensor,
    expected_gradients: Sequence[Tensor],
    actual_gradients: Sequence[Tensor],
    tolerance: float = 1e-10,
) -> None:
    assert math.isclose(expected.item(), actual.item(), rel_tol=tolerance, abs_tol=tolerance), (
        f"{loss.name}, {form}: loss {actual.item()} instead of {expected.item()}"
    )
    reference = torch.cat(list(expected_gradients))
    difference = float((reference - torch.cat(list(actual_gradients))).norm())
    size = float(reference.norm())
    assert difference <= tolerance * max(size, 1.0), f"{loss.name}, {form}: the gradient differs by {difference}"
