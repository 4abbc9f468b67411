"""Digests of what every rank must have been given alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .....datums.types import Datum
from ...models.facts.quantized import sampled_numbers

__all__ = ["datum_digest", "parameter_fingerprints", "tensor_digest"]


def datum_digest(datum: Datum) -> bytes:
    """Return a digest of a datum's tokens and inputs."""
    inputs = sorted(datum.loss_fn_inputs.items())
    keys = ",".join(key for key, _ in inputs).encode()
    tensors = [datum.model_input.tokens, *(value.to_torch() for _, value in inputs)]
    return hashlib.sha256(keys + tensor_digest(tensors)).digest()


def parameter_fingerprints(module: nn.Module) -> dict[str, bytes]:
    """Return a digest of each parameter by name: its shape, whether it is trained, and a sample of its numbers."""
    found = {}
    for name, p in module.named_parameters():
        digest = hashlib.sha256(f"{tuple(p.shape)} {p.dtype} {p.requires_grad}".encode())
        digest.update(tensor_digest([*sampled_numbers(p.detach())]))
        found[name] = digest.digest()
    return found


def tensor_digest(tensors: Sequence[Tensor]) -> bytes:
    """Return a digest of numbers, shapes and dtypes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
