"""Builders: from tokens, text and rollouts to aligned datums. They shift once, and always add ``target_tokens``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import DatumError, LengthError
from ..losses.batch.adapt import as_tensor
from ..losses.batch.keys import ROLE_CHOSEN, ROLE_REJECTED
from .types import Datum, ModelInput

__all__ = [
    "Tokens",
    "check_max_length",
    "datum_from_prompt_completion",
    "datum_from_spans",
    "datum_from_tokens_weights",
    "preference_pair",
    "token_ids",
]

Tokens: TypeAlias = Iterable[int] | Tensor


def token_ids(tokens: Tokens) -> Tensor:
    """Return token ids as int64 [N]."""
    return ModelInput.from_ints(tokens).tokens


def check_max_length(max_length: int | None) -> None:
    """Check the length of the longest model input; a slice would read a negative one from the other end.

    Raises:
        DatumError: it is no whole number of 1 or more, and not None.
    """
    whole = isinstance(max_length, Integral) and not isinstance(max_length, bool)
    if max_length is None or (whole and max_length >= 1):
        return
    raise DatumError(f"max_length must be a whole number, 1 or more, got {max_length!r}")


def datum_from_tokens_weights(tokens: Tokens, weights: Any, max_length: int | None = None) -> Datum:
    """Build from a whole sequence and one weight per token.

    Args:
        tokens: int [T + 1].
        weights: [T + 1]; the weight of each token *as a target*. The first one is never a target, its weight is dropped.
        max_length: longest model input, tokens; what lies beyond is cut off on the right.

    Returns:
        ``model_input = tokens[:-1]``, ``target_tokens = tokens[1:]``, ``weights = weights[1:]``.

    Raises:
        LengthError: not one weight per token.
        DatumError: fewer than two tokens, no trained token within ``max_length``, or that is below 1.
    """
    check_max_length(max_length)
    ids, values = token_ids(tokens), as_tensor(weights).to(torch.float32)
    if values.shape != ids.shape:
        raise LengthError(
            f"weights has shape {tuple(values.shape)} but there are {ids.numel()} tokens; give one per token"
        )
    if ids.numel() < 2:
        raise DatumError(f"needs at least two tokens (one goes in, one is the target), got {ids.numel()}")
    if max_length is not None and ids.numel() > max_length + 1:
        had_trained = bool((values[1:] != 0).any())
        ids, values = ids[: max_length + 1], values[: max_length + 1]
        if had_trained and not bool((values[1:] != 0).any()):
            raise DatumError(f"max_length={max_length} cuts off every trained token; shorten the prompt instead")
    inputs: dict[str, Any] = {"target_tokens": ids[1:], "weights": values[1:]}
    return Datum(ModelInput(ids[:-1]), inputs)


def datum_from_spans(tokens: Tokens, spans: Sequence[tuple[int, int]]) -> Datum:
    """Build from a whole sequence and the half-open spans of tokens to train on, e.g. ``[(17, 42)]``.

    Raises:
        DatumError: a span is empty, leaves the sequence, or begins at token 0 (which nothing predicts).
    """
    ids = token_ids(tokens)
    weights = torch.zeros(ids.numel())
    for start, stop in spans:
        if not 1 <= start < stop <= ids.numel():
            raise DatumError(f"span ({start}, {stop}) must lie within tokens 1 to {ids.numel()} and not be empty")
        weights[start:stop] = 1.0
    return datum_from_tokens_weights(ids, weights)


def datum_from_prompt_completion(prompt: Tokens, completion: Tokens, max_length: int | None = None) -> Datum:
    """Build from a prompt (not trained) and its completion (trained, first and last token included).

    Raises:
        DatumError: either is empty.
    """
    before, after = token_ids(prompt), token_ids(completion)
    if before.numel() == 0 or after.numel() == 0:
        raise DatumError(f"prompt ({before.numel()} tokens) and completion ({after.numel()}) must both have a token")
    weights = torch.cat([torch.zeros(before.numel()), torch.ones(after.numel())])
    return datum_from_tokens_weights(torch.cat([before, after]), weights, max_length)


def preference_pair(
    prompt: Tokens, chosen: Tokens, rejected: Tokens, *, pair_id: int | None = None
) -> tuple[Datum, Datum]:
    """Build the chosen and the rejected datum of a pair; each side is trained from the end of the prompt on.

    Raises:
        DatumError: a response is empty, or both are the same (their margin is 0 whatever the model does).
    """
    if token_ids(chosen).tolist() == token_ids(rejected).tolist():
        raise DatumError("chosen and rejected are the same tokens; such a pair has no gradient")
    pair = datum_from_prompt_completion(prompt, chosen), datum_from_prompt_completion(prompt, rejected)
    if pair_id is None:
        return pair
    return (
        pair[0].with_inputs(pair_id=[pair_id], role=[ROLE_CHOSEN]),
        pair[1].with_inputs(pair_id=[pair_id], role=[ROLE_REJECTED]),
    )
