"""Labels, as trainers have them: the tokens of a batch themselves, and -100 where nothing is trained."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ...errors import DatumError, LengthError
from ..inputs import require_tensor
from .selection import readable

__all__ = ["IGNORED", "mask_of_labels"]

IGNORED: Final = -100


def mask_of_labels(logprobs: Tensor, labels: Tensor) -> Tensor:
    """Return where a log-prob belongs to a label that is trained; bool, shape of ``logprobs``.

    Args:
        logprobs: [B, T].
        labels: int64, [B, T + 1] (the first token of a sequence has no log-prob), or [B, T] if they are shifted already.

    Raises:
        LengthError: there are as many log-probs as neither.
        DatumError: a label is no token id and not -100.
    """
    batch, length = _shape(logprobs)
    if require_tensor("labels", labels).is_floating_point() or labels.dtype == torch.bool:
        raise DatumError(f"labels are token ids, int64, got {labels.dtype}; a mask goes to from_padded(logprobs, mask)")
    if tuple(labels.shape) not in ((batch, length + 1), (batch, length)):
        raise LengthError(
            f"labels have shape {tuple(labels.shape)}, but logprobs {(batch, length)}: give one label more than log-probs, as "
            f"transformers has them, {(batch, length + 1)}, or labels that are shifted already, {(batch, length)}"
        )
    if readable(labels):
        _check_ids(labels)
    return labels[:, -length:] != IGNORED if length else labels[:, :0] != IGNORED


def _shape(logprobs: Tensor) -> tuple[int, int]:
    if require_tensor("logprobs", logprobs).dim() != 2:
        logits = "; logits go through pullback.ops.logprobs_from_logits first" if logprobs.dim() == 3 else ""
        raise LengthError(f"logprobs must be [B, T], one per label, got shape {tuple(logprobs.shape)}{logits}")
    return logprobs.shape[0], logprobs.shape[1]


def _check_ids(labels: Tensor) -> None:
    wrong = ((labels < 0) & (labels != IGNORED)).nonzero()
    if len(wrong):
        sequence, token = wrong[0].tolist()
        raise DatumError(
            f"sequence {sequence}, label {token} is {int(labels[sequence, token])}: a label is a token id, or {IGNORED} where "
            "nothing is trained"
        )
