"""Losses that depend on which tokens were sampled: what is read of the provenance that the SDK sends with its datums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...datums.types import Datum
from ...errors import ConfigError, InvalidDatumsError
from ..wire.protobuf import GradientRequest
from ..wire.provenance import Provenance

__all__ = ["with_provenance"]

_STABLE: Final = "stable_reinforce"
_NEEDS: Final = ("target_tokens", "advantages", "logprobs")
_THRESHOLDS: Final = ("clip_low_threshold", "clip_high_threshold")
_SAYS: Final = {"dro": ("weights",), "gspo": ("weights", "sequence_ratio_mask")}  # inputs that tell prompt from sample


def with_provenance(request: GradientRequest, data: Sequence[Datum]) -> list[Datum]:
    """Return the datums as the loss of a request needs them.

    ``dro`` and ``gspo`` must not take a prompt for what was sampled: where the inputs of a datum say nothing of it, its
    ``weights`` become 1 at the targets that its provenance calls sampled, and 0 elsewhere. The inputs of
    ``stable_reinforce`` are checked here; the registry then says why it is not provided.

    Raises:
        InvalidDatumsError: provenance that does not fit its datum, inputs that ``stable_reinforce`` could not use, or clip
            thresholds of single tokens, which no loss here takes.
        ConfigError: a config that ``stable_reinforce`` could not use.
    """
    if request.loss_fn != "custom":  # whose inputs have the names that its sender gives them
        _raise([_thresholds(datum) for datum in data])
    if request.loss_fn == _STABLE:
        _check_config(request.config)
        _raise([_stable_problems(datum, given) for datum, given in _pairs(request, data)])
    if request.loss_fn not in _SAYS:
        return list(data)
    says = _SAYS[request.loss_fn]
    pairs = [
        (datum, None if any(key in datum.loss_fn_inputs for key in says) else given)
        for datum, given in _pairs(request, data)
    ]
    _raise([[] if given is None else _misfits(datum, given) for datum, given in pairs])
    return [datum if given is None else datum.with_inputs(weights=given.sampled().float()) for datum, given in pairs]


def _pairs(request: GradientRequest, data: Sequence[Datum]) -> list[tuple[Datum, Provenance | None]]:
    return list(zip(data, request.provenance() or [None] * len(data), strict=True))


def _raise(problems: Sequence[Sequence[str]]) -> None:
    numbered = [f"datum {i}: {problem}" for i, several in enumerate(problems) for problem in several]
    if numbered:
        raise InvalidDatumsError(numbered)


def _thresholds(datum: Datum) -> list[str]:
    words = "for single tokens is not supported by this server, and would be ignored: give one for all tokens in loss_fn_config"
    return [f"{key} {words}" for key in _THRESHOLDS if key in datum.loss_fn_inputs]


def _misfits(datum: Datum, provenance: Provenance) -> list[str]:
    targets = datum.loss_fn_inputs.get("target_tokens")
    return provenance.problems(len(datum.model_input), 0 if targets is None else len(targets.to_torch()))


def _stable_problems(datum: Datum, provenance: Provenance | None) -> list[str]:
    inputs = datum.loss_fn_inputs
    problems = [f"missing required field {key!r} (has: {', '.join(inputs)})" for key in _NEEDS if key not in inputs]
    if provenance is None:
        return [*problems, f"{_STABLE} needs to know which tokens were sampled: give them by Datum.with_provenance"]
    if problems := [*problems, *_misfits(datum, provenance)]:
        return problems
    advantages, sampled = inputs["advantages"].to_torch(), provenance.sampled()
    if advantages.shape != sampled.shape:
        return [f"advantages has the shape {list(advantages.shape)}, target_tokens {list(sampled.shape)}"]
    places = ((advantages != 0) & ~sampled).nonzero().flatten().tolist()
    return [f"target {place} has an advantage, but was not sampled" for place in places[:1]]


def _check_config(config: Mapping[str, Any]) -> None:
    unknown = sorted(set(config) - {"kl_coeff"})
    if unknown:
        raise ConfigError(f"loss {_STABLE!r} has no config key {unknown[0]!r}; it has: kl_coeff")
    value = config.get("kl_coeff", 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"kl_coeff of {_STABLE!r} must be a finite number >= 0, got {value!r}")
