"""The gradient of a loss on a case, and the properties of losses; see `pullback.testing.losscheck`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.base import Loss
from ..losses.evaluation.output import LossOutput
from .cases import Case
from .losscheck import check_loss

__all__ = ["check_loss", "cotangent"]


def cotangent(loss: Loss, case: Case) -> tuple[LossOutput, list[Tensor]]:
    """Return a loss's output and dL/dlogprob, one tensor per sequence."""
    batch, leaf = case.batch()
    output = loss.evaluate(batch)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, list(torch.split(gradient, [len(s.logprobs) for s in case.sequences]))
