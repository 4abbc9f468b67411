"""To and from the types of the tinker SDK and of Fireworks' fork, without loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DatumError, require_extra
from .types import Datum, ModelInput, TensorData

__all__ = ["from_tinker", "to_fireworks", "to_tinker"]


def to_tinker(data: Sequence[Datum]) -> list[Any]:
    """Return the datums as ``tinker.Datum``.

    Raises:
        MissingExtraError: the SDK is not installed.
    """
    return _to(data, require_extra("tinker", "remote", "to_tinker"))


def to_fireworks(data: Sequence[Datum]) -> list[Any]:
    """Return the datums as ``fireworks.training.sdk.Datum``.

    Raises:
        MissingExtraError: the SDK is not installed.
    """
    return _to(data, require_extra("fireworks.training.sdk", "fireworks", "to_fireworks"))


def from_tinker(data: Sequence[Any]) -> list[Datum]:
    """Return ``tinker.Datum`` objects (or Fireworks') as datums.

    Raises:
        DatumError: a model input holds images or other chunks that are no tokens.
    """
    return [_from_foreign(datum, i) for i, datum in enumerate(data)]


def _to(data: Sequence[Datum], types: Any) -> list[Any]:
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(datum.model_input.to_ints()),
            loss_fn_inputs={
                key: types.TensorData(data=value.data, dtype=value.dtype, shape=value.shape)
                for key, value in datum.loss_fn_inputs.items()
            },
        )
        for datum in data
    ]


def _from_foreign(datum: Any, index: int) -> Datum:
    tokens: list[int] = []
    for chunk in datum.model_input.chunks:
        if not hasattr(chunk, "tokens"):
            raise DatumError(f"datum {index}: model_input has a {type(chunk).__name__}; only text can be scored here")
        tokens.extend(int(token) for token in chunk.tokens)
    inputs = {key: TensorData(_dense(value), value.dtype) for key, value in datum.loss_fn_inputs.items()}
    return Datum(ModelInput.from_ints(tokens), inputs)


def _dense(value: Any) -> Tensor:
    """Return the numbers in their shape; sparse ones (CSR) are filled up with zeros."""
    dtype = torch.int64 if value.dtype == "int64" else torch.float32
    numbers = torch.as_tensor(list(value.data), dtype=dtype)
    columns = getattr(value, "sparse_col_indices", None)
    if columns is None:
        return numbers if value.shape is None else numbers.reshape(tuple(value.shape))
    starts = torch.as_tensor(list(value.sparse_crow_indices))
    rows = torch.arange(starts.numel() - 1).repeat_interleave(starts.diff())
    dense = torch.zeros(tuple(value.shape), dtype=dtype)
    dense[rows, torch.as_tensor(list(columns))] = numbers
    return dense
