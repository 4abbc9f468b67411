"""The JSON form of datums and results, for clients that do not speak protobuf."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...datums.types import Datum, ModelInput, TensorData
from ...errors import DatumError
from .protobuf import DTYPE_NUMBERS, GradientRequest, decode_tensor, message, tokens_of
from .sampling import NOT_SCORED
from .sparse import SparseRows

__all__ = ["decode_json_request", "decode_json_sparse", "decode_json_tensor", "finite_metrics", "json_result"]

_DTYPES = {"float32": torch.float32, "int64": torch.int64}


def decode_json_request(given: Mapping[str, Any], forward_only: bool, custom: bool) -> GradientRequest:
    """Read the JSON form of ``forward`` or ``forward_backward``; its datums are read later."""
    inner = _object(given, "forward_input" if forward_only else "forward_backward_input")
    data, config = inner["data"], _object(inner, "loss_fn_config") if inner.get("loss_fn_config") is not None else {}
    return GradientRequest(
        model_id=given["model_id"],
        seq_id=given["seq_id"],
        payload=b"".join(_canonical(inner)),
        loss_fn=inner["loss_fn"],
        config=dict(config),
        forward_only=forward_only,
        custom=custom,
        data=lambda: [_datum(datum, i) for i, datum in enumerate(_datums(data))],
    )


def _canonical(inner: Mapping[str, Any]) -> Iterator[bytes]:
    """Write JSON with sorted keys, one datum after another: other threads run in between."""
    separator = b"{"
    for key in sorted(inner):
        yield separator + json.dumps(key).encode() + b": "
        separator = b", "
        if key == "data" and isinstance(inner[key], list):
            for i, datum in enumerate(inner[key]):
                yield (b", " if i else b"[") + json.dumps(datum, sort_keys=True).encode()
            yield b"]" if inner[key] else b"[]"
        else:
            yield json.dumps(inner[key], sort_keys=True).encode()
    yield b"}" if inner else b"{}"


def json_result(kind: str, answer: bytes) -> dict[str, Any]:
    """Write a protobuf answer as JSON; numbers that JSON does not have become null."""
    if kind == "sample":
        return _sample(message("SampleResponse").FromString(answer))
    output = message("ForwardBackwardOutput").FromString(answer)
    outputs: list[dict[str, Any]] = []
    for record in output.loss_fn_outputs:
        columns = {key: _split(field) for key, field in record.fields.items()}
        outputs += [{key: _json_tensor(parts[i]) for key, parts in columns.items()} for i in range(record.num_datums)]
    metrics = finite_metrics(output.metrics)
    return {"loss_fn_output_type": output.loss_fn_output_type, "loss_fn_outputs": outputs, "metrics": metrics}


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out metrics that JSON cannot hold: a client would ask again for ever."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def _object(given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = given[key]
    if not isinstance(value, Mapping):
        raise DatumError(f"{key} must be an object, got {type(value).__name__}")
    return value


def _datums(data: Any) -> list[Mapping[str, Any]]:
    if not isinstance(data, list) or not all(isinstance(datum, Mapping) for datum in data):
        raise DatumError("data must be a list of objects, each with model_input and loss_fn_inputs")
    return data


def _datum(datum: Mapping[str, Any], index: int) -> Datum:
    inputs = {}
    for key, value in _object(datum, "loss_fn_inputs").items():
        try:
            inputs[key] = TensorData(decode_json_tensor(value))
        except (RuntimeError, ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
            why = str(error).partition("\n")[0]  # torch adds where it lies in its sources
            raise DatumError(f"datum {index}: {key} cannot be read: {why}") from error
    return Datum(ModelInput.from_ints(tokens_of(datum["model_input"])), inputs)


def decode_json_tensor(value: Any) -> Tensor:
    """Read a tensor, a sparse one filled up with 0; raises what torch or a lookup raises."""
    if not isinstance(value, Mapping):
        raise ValueError(f"a tensor must be an object with data, dtype and shape, got {type(value).__name__}")
    if value.get("sparse_crow_indices") is not None:
        return decode_json_sparse(value).dense()
    tensor = torch.tensor(value["data"], dtype=_DTYPES[value["dtype"]])
    shape = value.get("shape")
    return tensor if shape is None else tensor.reshape(shape)


def decode_json_sparse(value: Any) -> SparseRows:
    """Read a sparse matrix; raises what torch or a lookup raises."""
    offsets, columns = (_indices(value[f"sparse_{part}_indices"]) for part in ("crow", "col"))
    return SparseRows.of(torch.tensor(value["data"], dtype=_DTYPES[value["dtype"]]), offsets, columns, value["shape"])


def _indices(numbers: Any) -> Tensor:
    tensor = torch.tensor(numbers) if numbers else torch.empty(0, dtype=torch.int64)
    if tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise ValueError("the indices of a sparse tensor must be lists of whole numbers")
    return tensor


def _split(field: Any) -> list[Tensor]:
    offsets = torch.frombuffer(bytearray(field.offsets), dtype=torch.int64).tolist()
    shape = [-1, *field.trailing_shape]
    return [decode_tensor(field.data[a:b], field.dtype).reshape(shape) for a, b in itertools.pairwise(offsets)]


def _json_tensor(values: Tensor) -> dict[str, Any]:
    dtype = "float32" if values.is_floating_point() else "int64"
    return {"data": _json_numbers(values), "dtype": dtype, "shape": list(values.shape)}


def _json_numbers(values: Tensor) -> list[float | None]:
    """Return a tensor's numbers, flat; None where JSON has no such number."""
    return [x if math.isfinite(x) else None for x in values.flatten().tolist()]


def _sample(response: Any) -> dict[str, Any]:
    sequences = []
    for sequence in response.sequences:
        tokens, logprobs = decode_tensor(sequence.tokens, 3).tolist(), decode_tensor(sequence.logprobs, 1).tolist()
        reason = "length" if sequence.stop_reason == 1 else "stop"
        sequences.append({"stop_reason": reason, "tokens": tokens, "logprobs": logprobs})
        if sequence.HasField("topk_sampled_logprobs"):
            sequences[-1]["topk_logprobs"] = _rows(sequence.topk_sampled_logprobs)
    written: dict[str, Any] = {"type": "sample", "sequences": sequences, "prompt_logprobs": None}
    if response.HasField("prompt_logprobs"):
        written["prompt_logprobs"] = _json_numbers(decode_tensor(response.prompt_logprobs, 1))
    if response.HasField("topk_prompt_logprobs"):
        written["topk_prompt_logprobs"] = _rows(response.topk_prompt_logprobs)
    if response.HasField("target_prompt_logprobs"):
        written["target_prompt_logprobs"] = _matrix(response.target_prompt_logprobs)
    if response.HasField("prompt_alt_tokens"):
        sampled = response.prompt_alt_tokens
        written["prompt_alt_tokens"] = {"tokens": _matrix(sampled.tokens), "logprobs": _matrix(sampled.logprobs)}
    return written


def _rows(top: Any) -> list[list[tuple[int, float]] | None]:
    """Pairs of id and log-prob of each position; None where there are none."""
    ids, logprobs = (
        decode_tensor(x, d).reshape(-1, top.k).tolist() for x, d in ((top.token_ids, 3), (top.logprobs, 1))
    )
    pairs = [list(zip(*row, strict=True)) for row in zip(ids, logprobs, strict=True)]
    return [None if row[0] == (0, NOT_SCORED) else row for row in pairs]


def _matrix(tensor: Any) -> dict[str, Any]:
    if tensor.WhichOneof("encoding") != "sparse_csr":
        return _json_tensor(decode_tensor(tensor.dense, tensor.dtype).reshape(list(tensor.shape)))
    sparse, int64 = tensor.sparse_csr, DTYPE_NUMBERS[torch.int64]
    return {
        **_json_tensor(decode_tensor(sparse.values, tensor.dtype)),
        "shape": list(tensor.shape),
        "sparse_crow_indices": decode_tensor(sparse.crow_indices, int64).tolist(),
        "sparse_col_indices": decode_tensor(sparse.col_indices, int64).tolist(),
    }
