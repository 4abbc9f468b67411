"""Digests of what every rank must have been given alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ....datums.types import Datum

__all__ = ["datum_digest", "tensor_digest"]


def datum_digest(datum: Datum) -> bytes:
    """Return a digest of a datum's tokens and inputs."""
    inputs = sorted(datum.loss_fn_inputs.items())
    keys = ",".join(key for key, _ in inputs).encode()
    tensors = [datum.model_input.tokens, *(value.to_torch() for _, value in inputs)]
    return hashlib.sha256(keys + tensor_digest(tensors)).digest()


def tensor_digest(tensors: Sequence[Tensor]) -> bytes:
    """Return a digest of numbers, shapes and dtypes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
