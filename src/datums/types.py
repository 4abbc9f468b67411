"""ModelInput, TensorData and Datum: the names and behaviour of the Tinker types, holding torch tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from ..errors import DatumError, LengthError
from ..losses.batch.adapt import as_tensor
from ..losses.batch.keys import INPUT_KEYS
from .explain import explain

__all__ = ["Datum", "ModelInput", "TensorData"]

TensorDtype = Literal["int64", "float32"]
_DTYPES: Final = {"int64": torch.int64, "float32": torch.float32}


def _integers(value: Any, name: str) -> Tensor:
    """Return ``value`` as an int64 tensor; a float would be cut silently, so it is refused."""
    tensor = as_tensor(value)
    if tensor.numel() == 0:
        return tensor.to(torch.int64)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise DatumError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.to(torch.int64)


@final
class TensorData:
    """A typed tensor of a datum.

    Args:
        data: a list, array, tensor or tensor-data object.
        dtype: ``int64`` or ``float32``; by default what ``data`` is made of.
        shape: by default the shape of ``data``.

    Raises:
        DatumError: floats given as int64, or an unknown dtype.
        LengthError: ``shape`` does not hold the given numbers.
    """

    def __init__(self, data: Any, dtype: TensorDtype | None = None, shape: Sequence[int] | None = None) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise DatumError(f"TensorData dtype must be 'int64' or 'float32', got {dtype!r}")
        tensor = _as_numbers(data)
        if dtype is None:
            dtype = "float32" if tensor.dtype.is_floating_point else "int64"
        tensor = _integers(tensor, "TensorData of dtype int64") if dtype == "int64" else tensor.to(torch.float32)
        if shape is not None:
            if math.prod(shape) != tensor.numel():
                raise LengthError(f"TensorData of shape {list(shape)} cannot hold {tensor.numel()} numbers")
            tensor = tensor.reshape(tuple(shape))
        self._tensor = tensor
        self.dtype: TensorDtype = dtype

    @property
    def shape(self) -> list[int]:
        """Shape of the tensor, as a list."""
        return list(self._tensor.shape)

    @cached_property
    def data(self) -> list[int] | list[float]:
        """The numbers, flat, as Python numbers."""
        return self._tensor.reshape(-1).tolist()

    @classmethod
    def from_torch(cls, tensor: Tensor) -> TensorData:
        """Wrap a tensor."""
        return cls(tensor)

    @classmethod
    def from_numpy(cls, array: Any) -> TensorData:
        """Wrap an array."""
        return cls(torch.as_tensor(array))

    def to_torch(self) -> Tensor:
        """Return the tensor itself, without a copy."""
        return self._tensor

    def to_numpy(self) -> Any:
        """Return the numbers as a numpy array that shares their memory."""
        return self._tensor.numpy()

    def tolist(self) -> Any:
        """Return the numbers as nested lists."""
        return self._tensor.tolist()

    def __len__(self) -> int:
        return self._tensor.numel()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        same = self.dtype == other.dtype and self.shape == other.shape
        return same and torch.equal(self._tensor.nan_to_num(nan=0.5), other._tensor.nan_to_num(nan=0.5))

    __hash__ = None  # type: ignore[assignment]  # holds a mutable tensor

    def __repr__(self) -> str:
        shown = ", ".join(f"{x:g}" for x in self.data[:6])
        return f"TensorData([{shown}{', ...' if len(self) > 6 else ''}], {self.dtype!r}, shape={self.shape})"


def _as_numbers(data: Any) -> Tensor:
    try:
        tensor = as_tensor(data).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DatumError(f"TensorData needs numbers, got {type(data).__name__}: {error}") from error
    if tensor.dtype == torch.bool:
        return tensor.to(torch.float32)
    return tensor


@final
@dataclass(frozen=True, eq=False)
class ModelInput:
    """The tokens that go into the model.

    Args:
        tokens: int64 [T]; build it with `from_ints`.
    """

    tokens: Tensor

    @classmethod
    def from_ints(cls, tokens: Iterable[int] | Tensor) -> ModelInput:
        """Build from token ids: a list, array or tensor, one-dimensional.

        Raises:
            DatumError: not integers, or not one-dimensional.
        """
        is_array = isinstance(tokens, Tensor) or hasattr(tokens, "__array__")
        ids = _integers(tokens if is_array else list(tokens), "tokens").cpu()
        if ids.dim() != 1:
            raise DatumError(f"tokens must be one-dimensional, got shape {tuple(ids.shape)}")
        return cls(ids)

    @classmethod
    def empty(cls) -> ModelInput:
        """Return an input without tokens."""
        return cls(torch.empty(0, dtype=torch.int64))

    def to_ints(self) -> list[int]:
        """Return the token ids as a list."""
        return [int(token) for token in self.tokens.tolist()]

    def append_int(self, token: int) -> ModelInput:
        """Return the input with one more token."""
        return ModelInput.from_ints([*self.to_ints(), token])

    @property
    def length(self) -> int:
        """T, the number of tokens."""
        return self.tokens.numel()

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelInput) and torch.equal(self.tokens, other.tokens)

    __hash__ = None  # type: ignore[assignment]  # holds a mutable tensor


@final
@dataclass(frozen=True, init=False)
class Datum:
    """One sequence and all that a loss needs beside its log-probs.

    Args:
        model_input: the tokens that go in, T of them.
        loss_fn_inputs: inputs by key (see `pullback.losses.batch.keys`); lists, arrays and tensors are wrapped. Entry j of a
            per-token input belongs to ``target_tokens[j]``, the token after ``model_input[j]``. Keys of your own are
            for your own functions.

    Raises:
        DatumError: ``model_input`` is no `ModelInput`, or an input is not made of numbers of its key's dtype.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, TensorData]

    def __init__(self, model_input: ModelInput, loss_fn_inputs: Mapping[str, Any]) -> None:
        if not isinstance(model_input, ModelInput):
            got = type(model_input).__name__
            raise DatumError(f"model_input must be a ModelInput, got {got}; use ModelInput.from_ints(tokens)")
        if not isinstance(loss_fn_inputs, Mapping):
            raise DatumError(
                f"loss_fn_inputs must be a mapping of keys to numbers, got {type(loss_fn_inputs).__name__}"
            )
        object.__setattr__(self, "model_input", model_input)
        object.__setattr__(self, "loss_fn_inputs", {k: _wrap(k, v) for k, v in loss_fn_inputs.items()})

    def with_inputs(self, **inputs: Any) -> Datum:
        """Return a datum with more (or other) inputs, e.g. ``datum.with_inputs(ref_logprobs=...)``."""
        return Datum(self.model_input, {**self.loss_fn_inputs, **inputs})

    def explain(self, tokenizer: Any = None, color: bool | None = None) -> str:
        """Return a table of what is trained on what; see `pullback.datums.explain`."""
        return explain(self, tokenizer, color)


def _wrap(key: str, value: Any) -> TensorData:
    known = INPUT_KEYS.get(key)
    if isinstance(value, TensorData) and (known is None or value.dtype == known.dtype):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    try:
        return TensorData(value, known.dtype if known is not None else None)
    except DatumError as error:
        raise type(error)(f"{key!r}: {error}") from error
