"""Validation: every problem of every datum, before any work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import InvalidDatumsError, suggestion
from ..losses.batch.keys import INPUT_KEYS, ROLE_CHOSEN, ROLE_GOLD, ROLE_REJECTED
from ..losses.batch.labels import IGNORED
from .types import Datum

__all__ = ["validate"]

_MOST_SHOWN = 20
_FINITE_WHERE_TRAINED = ("advantages", "logprobs", "old_logprobs", "ref_logprobs")
_LOGPROBS = ("logprobs", "old_logprobs", "ref_logprobs")
# other libraries' names of what a datum has
_SYNONYMS: Final = {
    **dict.fromkeys(("labels", "targets", "target_ids", "label_ids"), "target_tokens"),
    **dict.fromkeys(("mask", "loss_mask", "response_mask", "completion_mask", "loss_weights"), "weights"),
    **dict.fromkeys(
        [f"{policy}_logprobs" for policy in ("rollout", "sampling", "sampler", "behavior", "behaviour", "inference")],
        "logprobs",
    ),
    **dict.fromkeys(("prev_logprobs", "prox_logprobs", "proximal_logprobs"), "old_logprobs"),
    **dict.fromkeys(("reference_logprobs", "base_logprobs", "teacher_logprobs"), "ref_logprobs"),
}


def validate(
    data: Sequence[Datum],
    *,
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    vocab_size: int | None = None,
    max_length: int | None = None,
    known_keys: bool = False,
    pairs: bool = False,
) -> None:
    """Check the data of one call.

    Args:
        data: datums.
        required: keys that every datum must have.
        optional: keys that all datums have, or none.
        vocab_size: token ids are below it.
        max_length: longest model input, tokens.
        known_keys: refuse keys that no loss knows (a misspelt key would be ignored otherwise).
        pairs: the datums form whole preference pairs.

    Raises:
        InvalidDatumsError: lists all problems of all datums.
    """
    problems = list(_not_data(data))
    if not problems:
        for i, datum in enumerate(data):
            problems += [
                f"datum {i}: {problem}" for problem in _problems(datum, required, vocab_size, max_length, known_keys)
            ]
        problems += _uneven(data, optional)
    if not problems and pairs:
        problems += _broken_pairs(data)
    if problems:
        raise InvalidDatumsError(problems)


def _not_data(data: Any) -> Iterator[str]:
    if isinstance(data, Datum):
        yield "got one Datum; give a list of them: [datum]"
    elif isinstance(data, (str, bytes)) or not isinstance(data, Sequence):
        yield f"data must be a list of Datum, got {type(data).__name__}"
    elif not data:
        yield "data is empty; give at least one datum"
    else:
        for i, datum in enumerate(data):
            if not isinstance(datum, Datum):
                hint = "; convert it with pullback.datums.from_tinker" if hasattr(datum, "loss_fn_inputs") else ""
                if isinstance(datum, Mapping):
                    hint = "; data, report = pullback.datums.from_rows(rows, tokenizer) makes datums of dicts"
                yield f"datum {i}: expected a pullback Datum, got {type(datum).__module__}.{type(datum).__name__}{hint}"


def _problems(
    datum: Datum, required: Sequence[str], vocab_size: int | None, max_length: int | None, known_keys: bool
) -> Iterator[str]:
    inputs = datum.loss_fn_inputs
    yield from _token_problems("model_input", datum.model_input.tokens, vocab_size)
    length = len(datum.model_input)
    if length == 0:
        yield "model_input is empty; give at least one token"
    if max_length is not None and length > max_length:
        yield f"model_input has {length} tokens, more than max_length {max_length}; truncate it yourself"
    for key in required:
        if key not in inputs:
            yield f"missing required field {key!r} (has: {', '.join(inputs) or 'none'})"
    if known_keys:
        for key in inputs:
            if key not in INPUT_KEYS:
                yield f"unknown field {key!r}{_meant(key)}; registered losses would ignore it"
    yield from _shape_problems(datum, length)
    yield from _value_problems(datum, vocab_size)
    yield from _label_problems(datum, required)


def _meant(key: str) -> str:
    return f" (did you mean {_SYNONYMS[key]!r}?)" if key in _SYNONYMS else suggestion(key, INPUT_KEYS)


def _token_problems(name: str, tokens: Tensor, vocab_size: int | None) -> Iterator[str]:
    outside = tokens < 0
    if vocab_size is not None:
        outside = outside | (tokens >= vocab_size)
    if bool(outside.any()):
        limit = "" if vocab_size is None else f"; ids run from 0 to {vocab_size - 1}"
        yield f"{name} has token ids outside the vocabulary at {_places(outside)}: {_shown(tokens[outside])}{limit}"


def _shape_problems(datum: Datum, length: int) -> Iterator[str]:
    inputs = datum.loss_fn_inputs
    targets = inputs.get("target_tokens")
    if targets is not None:
        if len(targets.shape) not in (1, 2) or targets.shape[0] != length:
            yield (
                f"'target_tokens' has shape {targets.shape} but model_input has {length} tokens: entry j is the token that "
                "follows model_input[j], so both have the same length (nothing is truncated or padded)"
            )
            return
        expected, reason = targets.shape, "one per target token"
    else:
        if length == 1:
            yield "has one token and no target_tokens, so there is nothing to score; give target_tokens or more tokens"
        expected, reason = [max(length - 1, 0)], "without target_tokens the datum is scored on its own next tokens"
    for key, value in inputs.items():
        spec = INPUT_KEYS.get(key)
        if spec is None or key == "target_tokens":
            continue
        if not spec.per_token:
            if value.shape != [1]:
                yield f"{key!r} has shape {value.shape}, expected [1]: one number per sequence"
        elif value.shape != expected and not (key != "weights" and value.shape == expected[:1]):
            yield f"{key!r} has shape {value.shape}, expected {list(expected)} ({reason}; nothing is truncated or padded)"


def _value_problems(datum: Datum, vocab_size: int | None) -> Iterator[str]:
    inputs = datum.loss_fn_inputs
    if "target_tokens" in inputs:
        yield from _token_problems("'target_tokens'", inputs["target_tokens"].to_torch(), vocab_size)
    trained = None
    if "weights" in inputs:
        weights = inputs["weights"].to_torch()
        if bool((~torch.isfinite(weights)).any()):
            yield f"'weights' is not finite at {_places(~torch.isfinite(weights))}; use 0 for what is not trained"
        if bool((weights == IGNORED).any()):
            yield (
                f"'weights' is {IGNORED} at {_places(weights == IGNORED)}: that is transformers' label of an untrained token; "
                "give weight 0 there"
            )
        trained = weights != 0
        trained = trained if trained.dim() == 1 else trained.any(-1)
    for key in _FINITE_WHERE_TRAINED:
        if key in inputs:
            yield from _number_problems(key, inputs[key].to_torch(), trained)
    if "role" in inputs and inputs["role"].data not in ([ROLE_REJECTED], [ROLE_CHOSEN], [ROLE_GOLD]):
        yield f"'role' is {inputs['role'].data}; it is 0 (rejected), 1 (chosen) or 2 (gold)"


def _label_problems(datum: Datum, required: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the inputs of a loss of labelled answers; a function may mean something else by ``label``."""
    given = {key: datum.loss_fn_inputs[key].data for key in required if key in datum.loss_fn_inputs}
    if "label" in given and given["label"] not in ([0], [1]):
        yield f"'label' is {given['label']}; it is 1 (desirable) or 0 (undesirable)"
    for point in given.get("reference_point", ()):
        if not 0 <= point < math.inf:
            yield f"'reference_point' is {point:g}; it is a KL, a finite number of at least 0"


def _number_problems(key: str, values: Tensor, trained: Tensor | None) -> Iterator[str]:
    if trained is None or trained.shape != values.shape:
        trained = torch.ones_like(values, dtype=torch.bool)
    not_finite = ~torch.isfinite(values) & trained
    if bool(not_finite.any()):
        yield f"{key!r} is not finite at trained {_places(not_finite)}: {_shown(values[not_finite])}"
    positive = (values > 1e-3) & trained & torch.isfinite(values)
    if key in _LOGPROBS and bool(positive.any()):
        yield f"{key!r} is above 0 at {_places(positive)}: {_shown(values[positive])}; log-probs are at most 0 (probabilities?)"


def _uneven(data: Sequence[Datum], optional: Sequence[str]) -> Iterator[str]:
    for key in optional:
        without = [i for i, datum in enumerate(data) if key not in datum.loss_fn_inputs]
        if without and len(without) < len(data):
            yield f"{key!r} is given for some datums but not for datums {_shown(without)}; give it for all or none"


def _broken_pairs(data: Sequence[Datum]) -> Iterator[str]:
    named = "pair_id" in data[0].loss_fn_inputs
    if not named and len(data) % 2:
        yield f"datum {len(data) - 1}: has no partner; pairs are neighbours (2i chosen, 2i + 1 rejected) without pair_id"
        return
    roles: dict[int, list[tuple[int, int]]] = {}
    for i, datum in enumerate(data):
        inputs = datum.loss_fn_inputs
        if "role" not in inputs and not named:
            return
        if "role" not in inputs:
            yield f"datum {i}: has pair_id but no role; give 1 to chosen and 0 to rejected"
            return
        pair = int(inputs["pair_id"].data[0]) if named else i // 2
        roles.setdefault(pair, []).append((int(inputs["role"].data[0]), i))
    yield from _unmatched(roles)


def _unmatched(roles: Mapping[int, list[tuple[int, int]]]) -> Iterator[str]:
    for pair, members in roles.items():
        for role, name in ((ROLE_CHOSEN, "chosen"), (ROLE_REJECTED, "rejected")):
            count = sum(1 for r, _ in members if r == role)
            if count != 1:
                where = _shown([i for _, i in members])
                yield f"pair {pair} (datums {where}) has {count} {name} sequences in this call; it needs exactly one"


def _places(mask: Tensor) -> str:
    places = mask.nonzero().tolist()
    return f"position{'s' if len(places) > 1 else ''} {_shown([p[0] if len(p) == 1 else p for p in places])}"


def _shown(values: Any) -> str:
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    more = f" and {len(listed) - _MOST_SHOWN} more" if len(listed) > _MOST_SHOWN else ""
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in listed[:_MOST_SHOWN]) + more
