"""From anything datum-like (ours, tinker's, Fireworks') to a TokenBatch, by duck typing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import DatumError, LengthError, MissingFieldError
from .keys import INPUT_KEYS
from .labels import IGNORED
from .token_batch import TokenBatch

__all__ = ["as_tensor", "batch_field", "batch_from_datums", "logprobs_in_place"]


def batch_from_datums(
    data: Sequence[Any], logprobs: Sequence[Tensor], required: Sequence[str] = (), optional: Sequence[str] = ()
) -> TokenBatch:
    """Pack datums and their log-probs.

    Args:
        data: objects with a ``loss_fn_inputs`` mapping of lists, arrays, tensors or tensor-data objects.
        logprobs: one tensor per datum, [T] or [T, K], aligned to its target tokens.
        required: keys that every datum must have.
        optional: keys that are read where every datum has them.

    Raises:
        MissingFieldError: a required key is missing, or an optional one is in some datums only.
        LengthError: an input's shape is not that of the log-probs.
        DatumError: there are no datums, or a number that must be whole is not.
    """
    if isinstance(data, Tensor):
        raise DatumError(
            "a Loss called as a function takes (data, logprobs_list), with a datum for each tensor of log-probs; got tensors, "
            "for which there is loss.evaluate(TokenBatch.from_padded(logprobs, mask, ...))"
        )
    if len(data) != len(logprobs):
        raise LengthError(f"got {len(data)} datums but {len(logprobs)} log-prob tensors")
    if not data:
        raise DatumError("data is empty: a loss needs at least one datum")
    inputs = [_inputs(datum, i) for i, datum in enumerate(data)]
    packed = {batch_field(key): _pack(key, inputs, logprobs) for key in _keys(inputs, required, optional)}
    lengths = [lp.shape[0] for lp in logprobs]
    return TokenBatch.from_packed(_concat(logprobs), lengths, **packed)


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return a list, array, tensor or tensor-data object (``to_torch`` or ``data`` and ``shape``) as a tensor."""
    if isinstance(value, Tensor):
        return value.detach() if dtype is None else value.detach().to(dtype)
    if hasattr(value, "to_torch"):
        return as_tensor(value.to_torch(), dtype)
    if hasattr(value, "data") and hasattr(value, "shape") and not hasattr(value, "__array__"):
        flat = torch.as_tensor(value.data, dtype=dtype)
        return flat if value.shape is None else flat.reshape(tuple(value.shape))
    return torch.as_tensor(value, dtype=dtype)


def batch_field(key: str) -> str:
    """Return the `TokenBatch` field of a datum key: its ``logprobs`` are the sampler's, the batch's the current policy's."""
    return "rollout_logprobs" if key == "logprobs" else key


def logprobs_in_place(data: Sequence[Any]) -> list[Tensor]:
    """Return zeros in the place of the log-probs of datums, which have not been computed yet."""
    return [torch.zeros(_target_shape(_inputs(datum, i), i)) for i, datum in enumerate(data)]


def _target_shape(inputs: Mapping[str, Any], index: int) -> tuple[int, ...]:
    for key in ("target_tokens", "weights", "advantages", "logprobs"):
        if key in inputs:
            return tuple(as_tensor(inputs[key]).shape)
    raise MissingFieldError(f"datum {index}: missing required field 'target_tokens'")


def _inputs(datum: Any, index: int) -> Mapping[str, Any]:
    inputs = getattr(datum, "loss_fn_inputs", None)
    if not isinstance(inputs, Mapping):
        raise DatumError(f"datum {index}: {type(datum).__name__} has no loss_fn_inputs mapping")
    return inputs


def _keys(inputs: list[Mapping[str, Any]], required: Sequence[str], optional: Sequence[str]) -> list[str]:
    for key in required:
        for i, present in enumerate(inputs):
            if key not in present:
                raise MissingFieldError(
                    f"datum {i}: missing required field {key!r} (has: {', '.join(present) or 'none'})"
                )
    used = [key for key in optional if any(key in present for present in inputs)]
    for key in used:
        without = [i for i, present in enumerate(inputs) if key not in present]
        if without:
            raise MissingFieldError(f"{key!r} is given for some datums but not for {without}; give it for all or none")
    return [*required, *used]


def _pack(key: str, inputs: list[Mapping[str, Any]], logprobs: Sequence[Tensor]) -> Tensor:
    spec = INPUT_KEYS[key]
    reason = ", the shape of its log-probs (one per target token; nothing is truncated)" if spec.per_token else ""
    tensors = []
    for i, (present, lp) in enumerate(zip(inputs, logprobs, strict=True)):
        given = as_tensor(present[key])
        tensor = _whole(key, i, given) if spec.dtype == "int64" else _numbers(given)
        expected = tuple(lp.shape) if spec.per_token else (1,)
        if tuple(tensor.shape) != expected:
            raise LengthError(f"datum {i}: {key!r} has shape {tuple(tensor.shape)}, expected {expected}{reason}")
        tensors.append(tensor)
    return torch.cat(tensors)


def _whole(key: str, index: int, tensor: Tensor) -> Tensor:
    """Return whole numbers as int64; a conversion alone would cut off what comes after the point."""
    if tensor.is_floating_point() and bool((tensor != tensor.round()).any()):
        raise DatumError(f"datum {index}: {key!r} holds whole numbers, got {tensor.flatten()[:3].tolist()}")
    return tensor.to(torch.int64)


def _numbers(tensor: Tensor) -> Tensor:
    """Return whole numbers as floats, except a trainer's labels, which a `TokenBatch` refuses by their -100."""
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return tensor.float() if whole and not bool((tensor == IGNORED).any()) else tensor


def _concat(logprobs: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(lp.shape[1:]) for lp in logprobs}
    if len(shapes) > 1:
        raise LengthError(
            f"log-probs of one call must all be [T] or all [T, K] with one K, got trailing shapes {shapes}"
        )
    return torch.cat(list(logprobs))
