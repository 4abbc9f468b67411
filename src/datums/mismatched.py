"""Answers to other prompts: what KTO's reference point is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DatumError
from .builders import datum_from_tokens_weights
from .types import Datum

__all__ = ["mismatched"]


def mismatched(data: Sequence[Datum], max_length: int | None = None) -> list[Datum]:
    """Return each prompt of the datums with the answer of the datum before it; the first has that of the last.

    A prompt reaches to the first trained token, and an answer from there to the end, with its weights. Where neighbours have
    one prompt, as both sides of a preference have, shuffle the datums first: their answers are none to another prompt.

    Args:
        data: at least two datums.
        max_length: longest model input, tokens; an answer is cut on the right.

    Raises:
        DatumError: fewer than two datums, or one without a trained token or with several targets a position.
    """
    if len(data) < 2:
        raise DatumError(f"an answer to another prompt needs two datums or more, got {len(data)}")
    parts = [_parts(i, datum) for i, datum in enumerate(data)]
    return [
        datum_from_tokens_weights(
            torch.cat([part.prompt, other.answer]),
            torch.cat([torch.zeros(len(part.prompt)), other.weights]),
            max_length,
        )
        for part, other in zip(parts, [parts[-1], *parts[:-1]], strict=True)
    ]


class _Parts(NamedTuple):
    prompt: Tensor
    answer: Tensor
    weights: Tensor  # of the answer


def _parts(number: int, datum: Datum) -> _Parts:
    targets = datum.loss_fn_inputs["target_tokens"].to_torch() if "target_tokens" in datum.loss_fn_inputs else None
    if targets is None or targets.dim() != 1:
        raise DatumError(
            f"datum {number}: an answer is one target token for each position; this datum has other targets"
        )
    given = datum.loss_fn_inputs.get("weights")
    weights = torch.ones(len(targets)) if given is None else given.to_torch()
    trained = weights.nonzero()
    if not len(trained):
        raise DatumError(f"datum {number}: no token is trained, so it has no answer")
    first = int(trained[0])
    return _Parts(datum.model_input.tokens[: first + 1], targets[first:], weights[first:])
