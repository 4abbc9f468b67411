"""Whether a service computes the sum that the protocol has: its own report of each cross-entropy says so."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Final, final

import torch
from torch import Tensor

from ...datums.types import Datum
from ...losses.base import Loss
from ...losses.supervised.cross_entropy import CrossEntropy
from ..types import ForwardBackwardOutput

__all__ = ["SumAudit"]

_TOLERANCE: Final = 0.05  # of the terms' size; services score in half precision


@final
class SumAudit:
    """Compares what a service reports with the sum of its own log-probs, and warns once.

    Where a cross-entropy is divided by its weights, the weights that carry a custom loss mean something else.
    """

    def __init__(self) -> None:
        self._warned = False

    def named(self, loss: Loss, data: Sequence[Datum], output: ForwardBackwardOutput) -> ForwardBackwardOutput:
        """Compare a call that went by name, if it is the protocol's cross-entropy; return its output."""
        if loss == CrossEntropy():
            logprobs = [one["logprobs"].to_torch() for one in output.loss_fn_outputs]
            given = [datum.loss_fn_inputs.get("weights") for datum in data]
            weights = [torch.ones_like(x) if w is None else w.to_torch() for w, x in zip(given, logprobs, strict=True)]
            self.check(output.metrics, weights, logprobs)
        return output

    def check(self, metrics: Mapping[str, float], weights: Sequence[Tensor], logprobs: Sequence[Tensor]) -> None:
        """Compare one call.

        Args:
            metrics: the service's; without a sum nothing is compared.
            weights: one tensor per datum, as they were sent.
            logprobs: the service's, of the same shapes.
        """
        reported = metrics.get("surrogate_loss:sum", metrics.get("loss:sum"))
        if reported is None or self._warned:
            return
        terms = [-w.double() * x.double() for w, x in zip(weights, logprobs, strict=True)]
        wanted, size = (sum(float(f(t)) for t in terms) for f in (Tensor.sum, lambda t: t.abs().sum()))
        if abs(reported - wanted) <= _TOLERANCE * size + 1e-6:
            return
        self._warned = True
        warnings.warn(
            f"the service reports a cross-entropy of {reported:.6g} where the protocol's sum is {wanted:.6g}: it may divide by "
            "the weights, and a custom loss would then train something else. `pullback check backend --url` measures it; "
            "capabilities=Capabilities(losses=frozenset(), max_weight_sum=1.0) keeps to what a clamped mean computes rightly",
            RuntimeWarning,
            stacklevel=4,
        )
