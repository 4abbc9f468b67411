"""Datums from what a sampler drew: one completion, or several turns with other text between them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch import Tensor

from ..errors import DatumError, LengthError
from .builders import Tokens, datum_from_tokens_weights, token_ids
from .types import Datum

__all__ = ["Turn", "datum_from_rollout", "datum_from_turns", "turn_from_sglang", "turns_from_vllm"]

LogprobsOf: TypeAlias = Literal["policy", "sampler"]
_SHOWN: Final = 5


@final
@dataclass(frozen=True)
class Turn:
    """One call of a sampler.

    Args:
        prompt: int [P], at least one token; all that the sampler was given.
        tokens: int [C], at least one; what it drew, its stop token included.
        logprobs: [C]; log-prob of each token when it was drawn.
    """

    prompt: Tokens
    tokens: Tokens
    logprobs: Sequence[float] | Tensor


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
    logprobs_of: LogprobsOf = "policy",
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
    datum = _joined([Turn(prompt, tokens, logprobs)], [advantage])
    return datum.with_inputs(**_provenance(group_id, temperature, top_p, weights_version))


def datum_from_turns(
    turns: Sequence[Turn],
    advantage: float | Tensor | Sequence[float | Sequence[float] | Tensor],
    *,
    group_id: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    weights_version: int | None = None,
    logprobs_of: LogprobsOf = "policy",
) -> Datum:
    """Build from several turns of one episode: the tokens that were drawn are trained, those between them are not.

    Args:
        turns: in order. Each prompt is the prompt and the tokens of the turn before, token for token, and what came in between:
            the answer of a tool, the next question, a header.
        advantage: one number, or one entry per turn (in a list, an array or a tensor): a number, or one per token of the turn.
        group_id, temperature, top_p, top_k, weights_version, logprobs_of: as in `datum_from_rollout`.

    Returns:
        One datum over the last prompt and its tokens, with ``weights`` 1 on all that was drawn; elsewhere advantages and
        log-probs read 0.

    Raises:
        LengthError: log-probs or advantages are not one per token of their turn, or not one per turn.
        DatumError: a prompt does not continue the turn before (say, because its text was tokenized anew: the tokens would not
            be those that were drawn), or what `datum_from_rollout` refuses.

    Warns:
        UserWarning: the distribution was cut.
    """
    if isinstance(turns, Turn) or not turns:
        raise DatumError("turns must be a list of at least one Turn")
    _check_sampling(temperature, top_p, top_k, logprobs_of)
    advantages = _per_turn(advantage, len(turns))
    if len(advantages) != len(turns):
        raise LengthError(
            f"advantage has {len(advantages)} entries, but there are {len(turns)} turns; give a number, or one each"
        )
    return _joined(turns, advantages).with_inputs(**_provenance(group_id, temperature, top_p, weights_version))


def turns_from_vllm(output: Any) -> list[Turn]:
    """Return the turns of a vLLM ``RequestOutput``, one per completion.

    vLLM tells log-probs before the temperature, unless its engine has ``logprobs_mode="processed_logprobs"``: at another
    temperature than 1 a datum needs the latter, with ``logprobs_of="sampler"``.

    Args:
        output: has ``prompt_token_ids`` and ``outputs``, each with ``token_ids`` and ``logprobs``.

    Raises:
        DatumError: it has no prompt tokens, or no log-prob of a token that was drawn.
    """
    prompt = getattr(output, "prompt_token_ids", None)
    if prompt is None:
        raise DatumError(f"{type(output).__name__} has no prompt_token_ids; give the prompt to vLLM as text or tokens")
    turns = []
    for number, completion in enumerate(output.outputs):
        tokens = [int(token) for token in completion.token_ids]
        if completion.logprobs is None:
            raise DatumError(f"completion {number} has no logprobs; sample with SamplingParams(logprobs=0)")
        if len(completion.logprobs) != len(tokens):
            raise LengthError(f"completion {number} has {len(tokens)} tokens, but {len(completion.logprobs)} log-probs")
        values = [_chosen(number, j, completion.logprobs[j], token) for j, token in enumerate(tokens)]
        turns.append(Turn(list(prompt), tokens, values))
    return turns


def turn_from_sglang(response: Mapping[str, Any], prompt: Tokens) -> Turn:
    """Return the turn of an SGLang response (of ``Engine.generate`` or ``/generate``).

    SGLang tells log-probs after the temperature, unless its environment has ``SGLANG_RETURN_ORIGINAL_LOGPROB``: give a datum
    ``logprobs_of="sampler"`` with the former.

    Args:
        response: has ``meta_info`` with ``output_token_logprobs``: (log-prob, token, text) for each token.
        prompt: int [P]; the ``input_ids`` of the request.

    Raises:
        DatumError: it has no log-probs, one is missing, or they are of other tokens than ``output_ids``.
    """
    entries = (response.get("meta_info") or {}).get("output_token_logprobs")
    if not entries:
        raise DatumError("the response has no output_token_logprobs; ask for them with return_logprob=True")
    tokens = [int(entry[1]) for entry in entries]
    told = response.get("output_ids")
    if told is not None and [int(token) for token in told] != tokens:
        raise DatumError(f"output_ids ({len(told)}) are not the tokens of output_token_logprobs ({len(tokens)})")
    missing = next((j for j, entry in enumerate(entries) if entry[0] is None), None)
    if missing is not None:
        raise DatumError(f"token {missing} of the response has no log-prob; a datum needs that of each drawn token")
    return Turn(prompt, tokens, [float(entry[0]) for entry in entries])


def _chosen(number: int, place: int, entry: Any, token: int) -> float:
    found = entry.get(token) if isinstance(entry, Mapping) else entry
    value = getattr(found, "logprob", found)
    if value is None:
        raise DatumError(f"completion {number} token {place}: its log-probs have no entry of the drawn token {token}")
    return float(value)


def _per_turn(advantage: Any, turns: int) -> list[Any]:
    """Return the advantages of the turns: one number for all of them, or the entries of a list, an array or a tensor."""
    if getattr(advantage, "ndim", None) == 0 or not isinstance(advantage, Iterable):
        return [advantage] * turns
    return list(advantage)


def _joined(turns: Sequence[Turn], advantages: Sequence[Any]) -> Datum:
    """Return the datum of turns of which each continues the one before."""
    drawn: list[tuple[int, int]] = []
    inputs: dict[str, list[Tensor]] = {"logprobs": [], "advantages": []}
    whole = torch.empty(0, dtype=torch.int64)
    for number, (turn, advantage) in enumerate(zip(turns, advantages, strict=True)):
        prompt, tokens = token_ids(turn.prompt), token_ids(turn.tokens)
        if prompt.numel() == 0 or tokens.numel() == 0:
            counts = f"prompt ({prompt.numel()} tokens) and completion ({tokens.numel()})"
            raise DatumError(f"{_place(turns, number)}{counts} must both have a token")
        _check_continues(number, whole, prompt)
        whole = torch.cat([prompt, tokens])
        drawn.append((prompt.numel(), whole.numel()))
        for name, value in (("logprobs", turn.logprobs), ("advantages", advantage)):
            inputs[name].append(_per_token(_place(turns, number) + name, value, tokens.numel(), name == "advantages"))
    trained = torch.zeros(whole.numel(), dtype=torch.bool)
    for start, stop in drawn:
        trained[start:stop] = True
    datum = datum_from_tokens_weights(whole, trained.float())
    targets = trained[1:]
    return datum.with_inputs(
        **{
            name: torch.zeros(targets.numel()).masked_scatter(targets, torch.cat(values))
            for name, values in inputs.items()
        }
    )


def _place(turns: Sequence[Turn], number: int) -> str:
    return f"turn {number}: " if len(turns) > 1 else ""


def _check_continues(number: int, before: Tensor, prompt: Tensor) -> None:
    length = before.numel()
    if prompt.numel() >= length and torch.equal(prompt[:length], before):
        return
    shared = min(length, prompt.numel())
    differing = (prompt[:shared] != before[:shared]).nonzero().flatten().tolist()
    place = differing[0] if differing else shared
    found, expected = (tokens[place : place + _SHOWN].tolist() for tokens in (prompt, before))
    raise DatumError(
        f"turn {number}: its prompt does not continue the last turn: from token {place} on it has {found}, and not {expected}; "
        "give the sampler the tokens that it drew, not their text tokenized anew; or make one datum of each turn"
    )


def _per_token(name: str, values: Any, count: int, repeat: bool) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        missing = [j for j, value in enumerate(values) if value is None] if isinstance(values, Sequence) else []
        what = f"{name}[{missing[0]}] is None" if missing else f"{name} are no numbers ({error})"
        raise DatumError(f"{what}; give one number per token of the completion") from error
    if repeat and tensor.dim() == 0:
        return tensor.expand(count)
    if tensor.shape != (count,):
        raise LengthError(f"{name} has shape {tuple(tensor.shape)}, but the completion has {count} tokens")
    return tensor


def _provenance(group_id: int | None, temperature: float, top_p: float, weights_version: int | None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"temperature": [temperature], "top_p": [top_p]}
    if weights_version is not None:
        inputs["weights_version"] = [weights_version]
    if group_id is not None:
        inputs["group_id"] = [group_id]
    return inputs


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
