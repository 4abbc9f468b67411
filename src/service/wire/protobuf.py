"""The Tinker protocol's protobuf messages, built at run time from one table, and tensors in and out of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...datums.types import Datum, ModelInput, TensorData
from ...errors import DatumError, TooLargeError, require_extra
from .protobuf_bounds import RequestSummary, WireBounds
from .provenance import Provenance
from .sparse import SparseRows

__all__ = [
    "DTYPE_NUMBERS",
    "GradientRequest",
    "decode_request",
    "decode_tensor",
    "encode_output",
    "message",
    "packed",
    "tokens_of",
]

# message: number name type label; label * repeated, ? explicit presence, | member of a oneof, map<key,value> as written
_TABLE = """
SparseCsr: 1 values bytes; 2 crow_indices bytes; 3 col_indices bytes
Tensor: 1 dense bytes |encoding; 2 sparse_csr SparseCsr |encoding; 3 dtype enum; 4 shape int64 *
BatchedTensor: 1 data bytes; 2 offsets bytes; 3 dtype enum; 4 trailing_shape int64 *
ArrayRecord: 1 type_tag string; 2 fields map<BatchedTensor>; 3 num_datums int64
ForwardBackwardOutput: 1 loss_fn_output_type string; 2 loss_fn_outputs ArrayRecord *; 3 metrics map<double>
LossConfigValue: 1 number double |value; 2 text string |value
EncodedText: 1 tokens bytes
Image: 1 data bytes; 2 format string; 3 expected_tokens int32 ?
Dmel: 1 dmel bytes
Chunk: 1 encoded_text EncodedText |chunk; 2 image Image |chunk; 3 dmel Dmel |chunk
Run: 1 sequence_id string; 2 offset int64; 3 length int64
Span: 1 prompt_tokens Run |span; 2 sampled_tokens Run |span
Datum: 1 model_input Chunk *; 2 loss_fn_inputs map<Tensor>; 3 model_input_spans Span *; 4 loss_fn_input_spans Span *
ForwardBackwardRequest: 1 model_id string; 2 seq_id int32; 3 data Datum *; 4 loss_fn string; 5 loss_fn_config map<double>; \
6 forward_only bool; 7 loss_fn_config_v2 map<LossConfigValue>
TopkLogprobs: 1 token_ids bytes; 2 logprobs bytes; 3 k uint32; 4 length uint32
PromptAltTokens: 1 tokens Tensor; 2 logprobs Tensor
SampledSequence: 1 stop_reason enum; 2 tokens bytes; 3 logprobs bytes ?; 4 topk_sampled_logprobs TopkLogprobs ?
SampleResponse: 1 sequences SampledSequence *; 2 prompt_logprobs bytes ?; 3 topk_prompt_logprobs TopkLogprobs ?; \
4 prompt_cache_hit_tokens int32; 5 target_prompt_logprobs Tensor ?; 6 prompt_alt_tokens PromptAltTokens ?
"""
# Numbers of protobuf's own types; an enum is read as an int32.
_SCALARS = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "enum": 5, "uint32": 13}
_DTYPES = {1: torch.float32, 2: torch.int64, 3: torch.int32, 4: torch.bfloat16}
DTYPE_NUMBERS = {torch.float32: 1, torch.int64: 2}


def message(name: str) -> Any:
    """Return a message class by name.

    Raises:
        MissingExtraError: protobuf is not installed.
    """
    return _messages()[name]


@final
@dataclass(frozen=True)
class GradientRequest:
    """A ``forward`` or ``forward_backward``, whichever way it was written.

    Attributes:
        model_id, seq_id: where it belongs.
        payload: what must be the same when it comes again.
        loss_fn, config: the loss.
        forward_only: no gradient.
        custom: it is, or may be, one half of the SDK's custom loss.
        data: reads the datums; raises `DatumError` if they cannot be read.
        provenance: reads where the tokens of each datum came from; none at all where the form does not carry it.
    """

    model_id: str
    seq_id: int
    payload: bytes
    loss_fn: str
    config: Mapping[str, Any]
    forward_only: bool
    custom: bool
    data: Callable[[], list[Datum]]
    provenance: Callable[[], list[Provenance | None]] = list


def decode_request(body: bytes, custom: bool = False, bounds: WireBounds | None = None) -> GradientRequest:
    """Read a ``ForwardBackwardRequest``; its datums are read later.

    A request over the bounds is not decoded: it keeps its number, and reading its datums fails.

    Args:
        body: on the wire.
        custom: it may be one half of the SDK's custom loss.
        bounds: of what it may hold; None: any.

    Raises:
        DatumError: it is no such message.
        TooLargeError: it is over the bounds, and does not say first which model it is for.
    """
    if bounds is not None and (summary := RequestSummary.of(body, bounds)).excess is not None:
        return _refused(body, summary.excess, summary, custom)
    request = message("ForwardBackwardRequest")()
    try:
        request.ParseFromString(body)
    except Exception as error:  # protobuf's own DecodeError, wherever the installed version keeps it
        raise DatumError(f"the body is no ForwardBackwardRequest: {error}") from error
    config: dict[str, Any] = dict(request.loss_fn_config)
    for key, value in request.loss_fn_config_v2.items():
        config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    return GradientRequest(
        model_id=request.model_id,
        seq_id=request.seq_id,
        payload=request.SerializeToString(deterministic=True),  # a map's order on the wire is not fixed
        loss_fn=request.loss_fn,
        config=config,
        forward_only=request.forward_only,
        custom=custom,
        data=lambda: [_datum(datum, i) for i, datum in enumerate(request.data)],
        provenance=lambda: [Provenance.of(d.model_input_spans, d.loss_fn_input_spans) for d in request.data],
    )


def _refused(body: bytes, excess: TooLargeError, summary: RequestSummary, custom: bool) -> GradientRequest:
    """Return a request whose datums cannot be read, by its number: those that come after it wait for it."""
    if not summary.model_id:
        raise excess

    def refuse() -> list[Datum]:
        raise excess

    payload = hashlib.sha256(body).digest()
    return GradientRequest(summary.model_id, summary.seq_id, payload, "", {}, summary.forward_only, custom, refuse)


def encode_output(outputs: Sequence[Mapping[str, TensorData]], metrics: Mapping[str, float]) -> bytes:
    """Write a ``ForwardBackwardOutput``: one record, each field the arrays of all datums end to end."""
    written = message("ForwardBackwardOutput")(loss_fn_output_type="ArrayRecord", metrics=metrics)
    record = written.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(outputs))
    for key in sorted({key for output in outputs for key in output}):
        arrays = [output[key].to_torch() for output in outputs]
        field, offset, offsets = record.fields[key], 0, [0]
        for array in arrays:
            offset += array.numel() * array.element_size()
            offsets.append(offset)
        field.data = b"".join(packed(array) for array in arrays)
        field.offsets = packed(torch.tensor(offsets))
        field.dtype = DTYPE_NUMBERS[arrays[0].dtype]
        field.trailing_shape.extend(arrays[0].shape[1:])
    return bytes(written.SerializeToString())


def tokens_of(model_input: Any) -> list[int]:
    """Return the tokens of a JSON model input.

    Raises:
        DatumError: it holds what is no text.
    """
    chunks = model_input.get("chunks") if isinstance(model_input, Mapping) else None
    if not isinstance(chunks, list) or not all(isinstance(chunk, Mapping) for chunk in chunks):
        raise DatumError("a model input must be an object with a list of chunks, each an object")
    tokens: list[int] = []
    for chunk in chunks:
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise DatumError(f"the input has a chunk of type {chunk.get('type')!r}; only text can be read here")
        if not isinstance(chunk.get("tokens"), list):
            raise DatumError("a chunk of text must have a list of tokens")
        tokens += chunk["tokens"]
    if not all(type(token) is int and -(2**63) <= token < 2**63 for token in tokens):
        raise DatumError("tokens must be whole numbers of 64 bits")
    return tokens


def _datum(datum: Any, index: int) -> Datum:
    tokens = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise DatumError(f"datum {index}: model_input has a chunk of kind {kind}; only text can be scored here")
        tokens.append(_array(chunk.encoded_text.tokens, torch.int32).long())
    inputs = {}
    for key, value in datum.loss_fn_inputs.items():
        try:
            inputs[key] = TensorData(_tensor(value))
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DatumError(f"datum {index}: {key} cannot be read: {error}") from error
    return Datum(ModelInput.from_ints(torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64)), inputs)


def _tensor(value: Any) -> Tensor:
    dtype, shape = _DTYPES[value.dtype], list(value.shape)
    if value.WhichOneof("encoding") != "sparse_csr":
        flat = _array(value.dense, dtype)
        return _widened(flat.reshape(shape) if shape else flat)
    sparse = value.sparse_csr
    offsets, columns = (_array(part, torch.int64) for part in (sparse.crow_indices, sparse.col_indices))
    return _widened(SparseRows.of(_array(sparse.values, dtype), offsets, columns, shape).dense())


def _widened(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values.long()


def decode_tensor(data: bytes, dtype: int) -> Tensor:
    """Return packed numbers of a protobuf field as a flat tensor."""
    return _array(data, _DTYPES[dtype])


def _array(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def packed(values: Tensor) -> bytes:
    """Return a tensor's numbers as they go on the wire."""
    return bytes(values.contiguous().numpy().tobytes())


@functools.cache
def _messages() -> dict[str, Any]:
    require_extra("google.protobuf", "serve", "the service")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="pullback_wire.proto", package="pullback_wire", syntax="proto3")
    names = []
    for line in _TABLE.strip().splitlines():
        name, fields = line.split(": ", 1)
        names.append(name)
        descriptor = file.message_type.add(name=name)
        for field in fields.split("; "):
            _add_field(descriptor, *field.split(" "))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    types = {name: pool.FindMessageTypeByName(f"pullback_wire.{name}") for name in names}
    return {name: message_factory.GetMessageClass(kind) for name, kind in types.items()}


def _add_field(descriptor: Any, number: str, name: str, kind: str, label: str = "") -> None:
    field = descriptor.field.add(
        name=name, number=int(number), label=3 if label == "*" or kind.startswith("map") else 1
    )
    if kind.startswith("map<"):
        entry = descriptor.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=1, type=9)
        _set_type(entry.field.add(name="value", number=2, label=1), kind[4:-1])
        field.type, field.type_name = 11, f".pullback_wire.{descriptor.name}.{entry.name}"
        return
    _set_type(field, kind)
    if label == "?":
        field.proto3_optional = True
    if label.startswith("|") or label == "?":
        oneof = label[1:] if label.startswith("|") else f"_{name}"
        known = [o.name for o in descriptor.oneof_decl]
        if oneof not in known:
            descriptor.oneof_decl.add(name=oneof)
            known.append(oneof)
        field.oneof_index = known.index(oneof)


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = 11, f".pullback_wire.{kind}"
