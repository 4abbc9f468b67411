"""Likelihood: what supervised losses are made of."""

from __future__ import annotations

from torch import Tensor

__all__ = ["negative_log_likelihood"]


def negative_log_likelihood(logprobs: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token, ``-logprob``.

    Its derivative with respect to the log-prob is -1.

    Args:
        logprobs: log-probs of the targets, nats; any shape.

    Returns:
        One value per token, shape and dtype of ``logprobs``.
    """
    return -logprobs
