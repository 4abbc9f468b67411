"""Likelihood: what supervised losses are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from .closed_form import closed_form

__all__ = ["nll"]


def nll(logprobs: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token, ``-logprob``.

    Its derivative with respect to the log-prob is -1.

    Args:
        logprobs: log-probs of the targets, nats; any shape.

    Returns:
        One value per token, shape and dtype of ``logprobs``.
    """
    return -logprobs


@closed_form(nll)
def _nll(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.neg(), torch.full_like(x, -1.0)
