"""Digests of what every rank must have been given alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ....datums.types import Datum
from ...prepared import PreparedCall

__all__ = ["call_digests", "tensor_digest"]


def call_digests(call: PreparedCall) -> list[bytes]:
    """Return one digest a datum, each of its tokens, its inputs, and of the loss with its hyperparameters and totals."""
    loss = f"{call.name} {call.described} {sorted((call.counts or {}).items())}".encode()
    return [hashlib.sha256(loss + _datum(datum)).digest() for datum in call.data]


def tensor_digest(tensors: Sequence[Tensor]) -> bytes:
    """Return a digest of numbers, shapes and dtypes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _datum(datum: Datum) -> bytes:
    inputs = sorted(datum.loss_fn_inputs.items())
    keys = ",".join(key for key, _ in inputs).encode()
    return keys + tensor_digest([datum.model_input.tokens, *(value.to_torch() for _, value in inputs)])
