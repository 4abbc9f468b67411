"""Builders: from tokens, text and rollouts to aligned datums. They shift once, and always add ``target_tokens``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import DatumError, LengthError
from ..losses.batch.adapt import as_tensor
from ..losses.batch.keys import ROLE_CHOSEN, ROLE_REJECTED
from .types import Datum, ModelInput

__all__ = [
    "datum_from_prompt_completion",
    "datum_from_rollout",
    "datum_from_spans",
    "datum_from_tokens_weights",
    "preference_pair",
]

Tokens: TypeAlias = Iterable[int] | Tensor


def _ids(tokens: Tokens) -> Tensor:
    return ModelInput.from_ints(tokens).tokens


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
        DatumError: fewer than two tokens, or no trained token within ``max_length``.
    """
    ids, values = _ids(tokens), as_tensor(weights).to(torch.float32)
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
    ids = _ids(tokens)
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
    before, after = _ids(prompt), _ids(completion)
    if before.numel() == 0 or after.numel() == 0:
        raise DatumError(f"prompt ({before.numel()} tokens) and completion ({after.numel()}) must both have a token")
    weights = torch.cat([torch.zeros(before.numel()), torch.ones(after.numel())])
    return datum_from_tokens_weights(torch.cat([before, after]), weights, max_length)


def datum_from_rollout(
    prompt: Tokens,
    tokens: Tokens,
    logprobs: Sequence[float] | Tensor,
    advantage: float | Sequence[float] | Tensor,
    *,
    group_id: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    weights_version: int | None = None,
    logprobs_of: Literal["policy", "sampler"] = "policy",
) -> Datum:
    """Build from a sampled completion.

    Args:
        prompt: int [P], at least one token.
        tokens: int [C]; the completion, its stop token included.
        logprobs: [C]; log-prob of each token when it was sampled.
        advantage: one number, or [C].
        group_id: the prompt group.
        temperature: it was sampled at; kept in the datum, which backends then score at this temperature.
        top_p, top_k: how the distribution was cut; ``top_p`` is kept in the datum.
        weights_version: optimizer steps the sampler's weights had seen; kept in the datum.
        logprobs_of: ``policy``: untempered. ``sampler``: of the tempered distribution, `Rollout.sampler_logprobs`; needed at
            another temperature than 1.

    Returns:
        A datum with ``weights`` 1 on the completion and 0 on the prompt, where advantages and log-probs read 0.

    Raises:
        LengthError: log-probs or advantages are not one per completion token.
        DatumError: the temperature is 0, or the log-probs are not those of the distribution that was sampled from: every
            ratio to it would be wrong.

    Warns:
        UserWarning: the distribution was cut: the tokens that were left out have a part in the ratio that they never had.
    """
    _check_sampling(temperature, top_p, top_k, logprobs_of)
    datum = datum_from_prompt_completion(prompt, tokens)
    trained = datum.loss_fn_inputs["weights"].to_torch() != 0
    count = int(trained.sum())
    advantages = torch.as_tensor(advantage, dtype=torch.float32)
    inputs: dict[str, Any] = {"temperature": [temperature], "top_p": [top_p]}
    if weights_version is not None:
        inputs["weights_version"] = [weights_version]
    for name, values in (
        ("logprobs", torch.as_tensor(logprobs, dtype=torch.float32)),
        ("advantages", advantages.expand(count) if advantages.dim() == 0 else advantages),
    ):
        if values.shape != (count,):
            raise LengthError(f"{name} has shape {tuple(values.shape)}, but the completion has {count} tokens")
        inputs[name] = torch.zeros(trained.numel()).masked_scatter(trained, values)
    if group_id is not None:
        inputs["group_id"] = [group_id]
    return datum.with_inputs(**inputs)


def preference_pair(
    prompt: Tokens, chosen: Tokens, rejected: Tokens, *, pair_id: int | None = None
) -> tuple[Datum, Datum]:
    """Build the chosen and the rejected datum of a pair; each side is trained from the end of the prompt on.

    Raises:
        DatumError: a response is empty, or both are the same (their margin is 0 whatever the model does).
    """
    if _ids(chosen).tolist() == _ids(rejected).tolist():
        raise DatumError("chosen and rejected are the same tokens; such a pair has no gradient")
    pair = datum_from_prompt_completion(prompt, chosen), datum_from_prompt_completion(prompt, rejected)
    if pair_id is None:
        return pair
    return (
        pair[0].with_inputs(pair_id=[pair_id], role=[ROLE_CHOSEN]),
        pair[1].with_inputs(pair_id=[pair_id], role=[ROLE_REJECTED]),
    )


def _check_sampling(temperature: float, top_p: float, top_k: int, logprobs_of: str) -> None:
    if not 0.0 < temperature < float("inf"):
        raise DatumError(
            f"a completion at temperature {temperature:g} was not drawn, so no ratio to its sampler exists"
        )
    if temperature != 1.0 and logprobs_of != "sampler":
        raise DatumError(
            f"log-probs of the untempered policy do not say how likely these tokens were at temperature {temperature:g}, and "
            "every ratio would be wrong; give those of the tempered distribution (rollout.sampler_logprobs) with "
            "logprobs_of='sampler': the datum is then scored at this temperature"
        )
    if top_p != 1.0 or top_k != -1:
        warnings.warn(
            f"this completion was drawn with top_p={top_p:g}, top_k={top_k}: tokens that were cut off had no chance, and a "
            "ratio to the whole distribution is biased; the metric rollouts_cut counts such datums",
            UserWarning,
            stacklevel=3,
        )
