"""Almost valid requests: a valid one for every route, with something in it replaced, removed or added."""

from __future__ import annotations

import copy
import json
from typing import Any

import zstandard
from helpers import make_data
from hypothesis import strategies as st
from servers import add_datum, json_datum

from pullback.service.wire.protobuf import message

__all__ = ["BODIES", "GETS", "JUNK_VALUES", "POSTS", "json_bodies", "packed_bodies", "proto_bodies"]

JSON = {"content-type": "application/json"}
PROTOBUF = {"content-type": "application/x-protobuf"}
LOSSES = ["cross_entropy", "ppo", "dpo", "grpo", "importance_sampling", "custom", "", "none"]

_NUMBERS = [-1, 0, 1, 3, 2**31, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf")]
_TEXTS = ["", "x", "\ud800", "\0", "../../up", "tinker://a/weights/b", "tinker://a/b", "é" * 300]
JUNK_VALUES: list[Any] = [None, True, False, *_NUMBERS, *_TEXTS, [], {}, [[]], [{}], {"": {}}]
_JUNK: st.SearchStrategy[Any] = st.sampled_from(JUNK_VALUES)
_VALUES = st.recursive(
    _JUNK | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_NODES = [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
    {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "logprobs"}], "kwargs": {}},
    {
        "op": "output",
        "name": "output",
        "target": "output",
        "args": [{"tuple": [{"ref": "sum_1"}, {"dict": {}}]}],
        "kwargs": {},
    },
]


def _inner() -> dict[str, Any]:
    return {"data": [json_datum([1, 2, 3]), json_datum([4, 5])], "loss_fn": "cross_entropy", "loss_fn_config": {}}


# One body for each route. The tests fill in the ids.
POSTS: dict[str, dict[str, Any]] = {
    "client/config": {"sdk_version": "0.38.0"},
    "client/dynamic_config": {"sdk_version": "0.38.0"},
    "telemetry": {"events": [{"event": "SESSION_START"}], "session_id": "SESSION"},
    "create_session": {"tags": [], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0", "type": "create_session"},
    "session_heartbeat": {"session_id": "SESSION"},
    "sessions/SESSION/finish": {"reason": {"type": "success"}},
    "create_model": {
        "session_id": "SESSION",
        "model_seq_id": 7,
        "base_model": "tiny",
        "lora_config": {"rank": 2, "seed": 1},
    },
    "unload_model": {"model_id": "MODEL", "type": "unload_model"},
    "get_info": {"model_id": "MODEL", "type": "get_info"},
    "create_custom_loss": {
        "session_id": "SESSION",
        "custom_loss_seq_id": 0,
        "name": "nll",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {"format": 1, "nodes": _NODES},
    },
    "forward": {"forward_input": _inner(), "model_id": "MODEL", "seq_id": 0},
    "forward_backward": {"forward_backward_input": _inner(), "model_id": "MODEL", "seq_id": 0},
    "optim_step": {
        "model_id": "MODEL",
        "seq_id": 0,
        "adam_params": {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0},
        "grad_accumulation_normalization": "num_sequences",
    },
    "save_weights": {"model_id": "MODEL", "path": "one", "seq_id": 0, "overwrite": True, "user_metadata": {"a": "b"}},
    "load_weights": {"model_id": "MODEL", "seq_id": 0, "path": "tinker://MODEL/weights/one", "optimizer": True},
    "save_weights_for_sampler": {
        "model_id": "MODEL",
        "path": "two",
        "kind": "snapshot",
        "seq_id": 0,
        "overwrite": True,
    },
    "create_sampling_session": {"session_id": "SESSION", "sampling_session_seq_id": 0, "base_model": "tiny"},
    "asample": {
        "sampling_session_id": "SAMPLER",
        "num_samples": 1,
        "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 2, "seed": 3, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "stop": []},
        "prompt_logprobs": True,
    },
    "retrieve_future": {"request_id": "REQUEST", "allow_metadata_only": True},
    "weights_info": {"tinker_path": "tinker://MODEL/weights/one"},
}
# More of what these routes read.
_CHECKPOINT = "tinker://MODEL/weights/one"
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    (
        "create_model",
        {
            "session_id": "SESSION",
            "model_seq_id": 8,
            "base_model": "tiny",
            "lora_config": {"rank": 2, "alpha": 4, "train_attn": True, "train_mlp": True, "train_unembed": False},
            "optimizer_config": {"type": "adamw"},
            "projection_head_dim": None,
            "base_only": False,
            "user_metadata": {"a": "b"},
        },
    ),
    ("create_model", {"session_id": "SESSION", "model_seq_id": 9, "path": _CHECKPOINT, "optimizer": True}),
    ("copy_weights", {"source_path": _CHECKPOINT, "session_id": "SESSION", "model_seq_id": 11}),
    (
        "save_weights_external",
        {"model_id": "MODEL", "seq_id": 0, "path": "three", "ttl_seconds": 60, "age_encryption_recipients": None},
    ),
    ("save_weights", {"model_id": "MODEL", "seq_id": 0, "path": "four", "ttl_seconds": 60, "overwrite": True}),
    ("load_adapter", {"model_id": "MODEL", "seq_id": 0, "path": _CHECKPOINT}),
    (
        "optim_step",
        {
            "model_id": "MODEL",
            "seq_id": 0,
            "optimizer_params": {
                "type": "adamw",
                "learning_rate": 0.01,
                "grad_clip_norm": 1.0,
                "grad_accumulation_normalization": 2.5,
            },
        },
    ),
    ("save_weights_for_sampler", {"model_id": "MODEL", "seq_id": 0, "sampling_session_seq_id": 5}),
    (
        "create_sampling_session",
        {"session_id": "SESSION", "sampling_session_seq_id": 6, "model_path": "tinker://MODEL/sampler_weights/two"},
    ),
    (
        "asample",
        {
            "sampling_session_id": "SAMPLER",
            "seq_id": 0,
            "num_samples": 2,
            "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}, {"tokens": [3]}]},
            "sampling_params": {"max_tokens": 1, "stop": [2]},
            "prompt_logprobs": True,
            "prompt_logprobs_last_n": 1,
            "topk_prompt_logprobs": 2,
            "topk_sample_logprobs": 2,
            "prompt_alt_tokens_k": 1,
            "target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 1]},
        },
    ),
    (
        "forward_backward",
        {"forward_backward_input": {**_inner(), "loss_fn": "custom"}, "model_id": "MODEL", "seq_id": 0},
    ),
]
BODIES = [*POSTS.items(), *VARIANTS]
_RUNS = ["training_runs", "training_runs/MODEL", "training_runs/MODEL/checkpoints", "checkpoints"]
GETS = ["healthz", "get_server_capabilities", "samplers/SAMPLER", *_RUNS, "sessions", "sessions/SESSION"]


@st.composite
def json_bodies(draw: st.DrawFn, body: dict[str, Any]) -> bytes:
    """Draw a body with up to three changes anywhere in it, or bytes that are no JSON at all."""
    changed: Any = copy.deepcopy(body)
    for _ in range(draw(st.integers(0, 3))):
        changed = _changed(draw, changed)
    raw = json.dumps(changed).encode()
    damage = draw(st.sampled_from(["no"] * 12 + ["cut", "deep", "more", "bytes"]))
    if damage == "cut":
        return raw[: len(raw) // 2]
    if damage == "deep":
        return b"[" * 100_000
    if damage == "more":
        return raw + b"}"
    return draw(st.binary(max_size=40)) if damage == "bytes" else raw


def _changed(draw: st.DrawFn, value: Any) -> Any:
    """Return a JSON value with one change at a random place."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 7)) == 0:
            return {k: v for k, v in value.items() if k != key}
        if draw(st.integers(0, 7)) == 0:
            return {**value, draw(st.text(max_size=6)): draw(_VALUES)}
        return {**value, key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        if draw(st.integers(0, 7)) == 0:
            return value[:place] + value[place + 1 :]
        return [*value[:place], _changed(draw, value[place]), *value[place + 1 :]]
    return draw(_VALUES)


@st.composite
def proto_bodies(draw: st.DrawFn, model: str, seq_id: int) -> bytes:
    """Draw a ``ForwardBackwardRequest`` whose tensors may contradict their shape or dtype, or with some bytes changed."""
    request = message("ForwardBackwardRequest")(model_id=model, seq_id=seq_id, loss_fn=draw(st.sampled_from(LOSSES)))
    request.forward_only = draw(st.booleans())
    for key in draw(st.lists(st.sampled_from(["clip_low", "beta", "loss_id", "x"]), max_size=2)):
        request.loss_fn_config[key] = draw(st.floats())
    for datum in make_data(draw(st.lists(st.integers(1, 6), max_size=4))):
        add_datum(request, datum)
    for _ in range(draw(st.integers(0, 3))):
        _distort(draw, request)
    raw = bytearray(request.SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 4])) if raw else 0):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


def _distort(draw: st.DrawFn, request: Any) -> None:
    """Change the kind of one tensor or one input."""
    if not request.data:
        return
    datum = request.data[draw(st.integers(0, len(request.data) - 1))]
    if not datum.loss_fn_inputs or draw(st.integers(0, 4)) == 0:
        chunk = datum.model_input.add()
        chunk.encoded_text.tokens = draw(
            st.binary(max_size=9) | st.sampled_from([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"])
        )
        if draw(st.booleans()):
            chunk.image.data = b"x"
        return
    key = draw(st.sampled_from(sorted(datum.loss_fn_inputs)))
    tensor, kind = (
        datum.loss_fn_inputs[key],
        draw(st.sampled_from(["dtype", "shape", "dense", "sparse", "key", "gone"])),
    )
    if kind == "dtype":
        tensor.dtype = draw(st.integers(-1, 6))
    if kind == "shape":
        tensor.shape[:] = draw(st.lists(st.sampled_from([-1, 0, 1, 2, 3, 2**40, 2**62]), max_size=3))
    if kind == "dense":
        tensor.dense = draw(st.binary(max_size=40))
    if kind == "sparse":
        tensor.sparse_csr.values = draw(st.binary(max_size=16))
        tensor.sparse_csr.crow_indices = draw(st.binary(max_size=24))
        tensor.shape[:] = draw(st.lists(st.integers(-1, 9), min_size=2, max_size=2))
    if kind == "key":
        datum.loss_fn_inputs[draw(st.text(max_size=5))].CopyFrom(tensor)
    if kind == "gone":
        del datum.loss_fn_inputs[key]


@st.composite
def packed_bodies(draw: st.DrawFn, body: bytes) -> tuple[bytes, dict[str, str]]:
    """Draw the content encoding of a body: none, compressed, wrongly compressed, or declared and not compressed."""
    kind = draw(st.sampled_from(["plain"] * 6 + ["zstd", "cut", "twice", "said", "br"]))
    packed = zstandard.compress(body)
    return {
        "plain": (body, {}),
        "zstd": (packed, {"content-encoding": "zstd"}),
        "cut": (packed[:-1], {"content-encoding": "zstd"}),
        "twice": (packed + packed, {"content-encoding": "zstd"}),
        "said": (body, {"content-encoding": "zstd"}),
        "br": (body, {"content-encoding": "br"}),
    }[kind]
