"""The tensors that a TokenBatch holds beside the log-probs: their names, shapes and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import ConfigError, DatumError, LengthError, MissingFieldError, suggestion
from .batch.problems import Problem

__all__ = [
    "INPUTS",
    "SEQUENCE_INPUTS",
    "TOKEN_INPUTS",
    "as_inputs",
    "check_inputs",
    "check_shape",
    "check_token_shape",
    "require_tensor",
]

TOKEN_INPUTS: Final = (
    "weights",
    "advantages",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "sequence_ratio_mask",
)
SEQUENCE_INPUTS: Final = ("pair_id", "role", "group_id", "label", "reference_point", "ref_logprob_sums")
INPUTS: Final = (*TOKEN_INPUTS, *SEQUENCE_INPUTS)


def require_tensor(name: str, value: Any) -> Tensor:
    """Return ``value``, which must be a tensor.

    Raises:
        DatumError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise DatumError(f"{name} of a TokenBatch must be a tensor, got {type(value).__name__}")
    return value


def as_inputs(logprobs: Tensor, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return inputs as constants on the device of the log-probs.

    Raises:
        TypeError: a name is unknown.
        DatumError: a value is no tensor.
    """
    for name in given:
        if name not in INPUTS:
            raise TypeError(
                f"TokenBatch has no input {name!r}{suggestion(name, INPUTS)}; it has: {', '.join(sorted(INPUTS))}"
            )
    return {name: _constant(name, value, logprobs.device) for name, value in given.items() if value is not None}


def check_inputs(given: Mapping[str, Tensor], shape: tuple[int, ...], sequences: int, candidates: bool = False) -> None:
    """Check the shapes of all inputs of a batch.

    Args:
        given: the inputs by name.
        shape: of the log-probs.
        sequences: B.
        candidates: the last dimension of ``shape`` is K, the candidates of a token.

    Raises:
        LengthError: one has another shape.
    """
    for name, value in given.items():
        if name in SEQUENCE_INPUTS:
            check_shape(name, value, (sequences,), "one number per sequence")
            continue
        if candidates and value.shape == shape[:-1]:
            raise LengthError(
                f"{name} has shape {tuple(value.shape)}, expected {shape} (the shape of logprobs): logprobs has {len(shape)} "
                f"dimensions, [{'B, T' if len(shape) == 3 else 'N'}, K], which are K candidates per token. Logits go through "
                "pullback.ops.logprobs_from_logits first"
            )
        check_token_shape(name, value, shape)


def missing_input(name: str, batch: object, need: str = "") -> MissingFieldError:
    """Return the error of a batch that lacks an input, with the key that a datum has for it.

    Args:
        name: field of the batch.
        batch: what lacks it.
        need: who needs the input, and what it is.
    """
    # In a batch ``logprobs`` are the current policy's.
    key, remedy = ("logprobs", "; on policy give logprobs.detach()") if name == "rollout_logprobs" else (name, "")
    place = f" (in a datum: {key!r})" if key != name else ""
    given = ", ".join(name for name in INPUTS if getattr(batch, name) is not None)
    has = f"the TokenBatch has: {given or 'log-probs only'}"
    return MissingFieldError(f"missing input {name!r}{place}{need}; {has}{remedy}")


def check_token_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check that an input has one entry per log-prob; advantages may have one per row of a padded batch.

    Raises:
        LengthError: it has another shape.
    """
    if (
        name == "advantages"
        and value is not None
        and len(shape) > 1
        and value.shape == (shape[0], *(1,) * (len(shape) - 1))
    ):
        return
    if value is not None and value.shape != shape and name == "advantages" and len(shape) > 1:
        # Said only then: to write a size down makes it a constant of a compiled graph.
        check_shape(name, value, shape, f"the shape of logprobs; one per sequence is [{shape[0]}]")
    check_shape(name, value, shape, "the shape of logprobs")


def check_shape(name: str, value: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    """Check the shape of an input.

    Raises:
        LengthError: it has another shape.
    """
    if value is not None and value.shape != shape:
        raise LengthError(f"{name} has shape {tuple(value.shape)}, expected {shape} ({meaning})")


def label_problems(weights: Tensor | None) -> list[Problem]:
    """Return the problems of a trainer's labels in the place of weights, where these are whole numbers."""
    if weights is None or weights.is_floating_point() or weights.dtype == torch.bool:
        return []
    whole = weights
    message = "weights contain -100: these are transformers' labels; give weights = labels != -100"
    return [
        Problem((weights == -100).any(), lambda: ConfigError(message)),
        Problem(((weights != 0) & (weights != 1)).any(), lambda: _whole_numbers(whole)),
    ]


def _whole_numbers(weights: Tensor) -> ConfigError:
    kind = str(weights.dtype).removeprefix("torch.")
    return ConfigError(
        f"weights are {kind} with values from {int(weights.min())} to {int(weights.max())}: are these labels? use "
        "TokenBatch.from_labels; a mask is of 0 and 1, and other weights are float"
    )


def _constant(name: str, value: Any, device: torch.device) -> Tensor:
    tensor = require_tensor(name, value)
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if tensor.device == device else tensor.to(device)
