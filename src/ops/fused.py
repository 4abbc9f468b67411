"""The row pass over a tile of logits in one Triton kernel; PyTorch's own operators are the fallback and the oracle."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FusedRows", "fused_rows", "is_available", "plain_rows"]

_BLOCK = 2048
_logger = logging.getLogger(__name__)


class FusedRows(NamedTuple):
    """What one pass over a tile found, each fp64 [C] but ``chosen`` (fp32).

    Attributes:
        lse: log-sum-exp of the tile's logits.
        mass: of the tile's own softmax, the target left out (1 where it lies elsewhere).
        chosen: the target's logit; 0 where it lies elsewhere.
    """

    lse: Tensor
    mass: Tensor
    chosen: Tensor


def plain_rows(z: Tensor, out: Tensor, columns: Tensor, factor: float) -> FusedRows:
    """Write the softmax of each row, without its target, to ``out``.

    Args:
        z: fp32 [C, v], products; overwritten.
        out: [C, v], any float dtype; may be ``z``.
        columns: int64 [C]; the target's place in the tile, -1 where it lies elsewhere.
        factor: positive, on the products.
    """
    z.mul_(factor)
    here = (columns >= 0)[:, None]
    column = columns.clamp(min=0)[:, None]
    chosen = torch.where(here, z.gather(-1, column), 0.0)[:, 0]
    highest = z.amax(-1).double()
    torch.softmax(z, -1, out=z)
    lse = highest - z.amax(-1).double().log()
    z.scatter_(-1, column, torch.where(here, 0.0, z.gather(-1, column)))
    mass = torch.where(here[:, 0], z.sum(-1).double(), 1.0)
    if out.data_ptr() != z.data_ptr():
        out.copy_(z)
    return FusedRows(lse, mass, chosen)


def fused_rows(z: Tensor, out: Tensor, columns: Tensor, factor: float) -> FusedRows:
    """Do what `plain_rows` does, reading the tile twice and writing it once."""
    count, width = z.shape
    highest, total, others, chosen = (z.new_zeros(count, dtype=torch.float32) for _ in range(4))
    from .triton_kernel import rows

    rows[(count,)](
        z, out, columns, highest, total, others, chosen, width, z.stride(0), out.stride(0), factor, BLOCK=_BLOCK
    )
    lse = highest.double() + total.double().log()
    return FusedRows(lse, torch.where(columns >= 0, others.double(), 1.0), chosen)


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernel compiles on a device and gives there what PyTorch gives; tried once."""
    if device.type != "cuda":
        return False
    try:
        return agrees(device)
    except Exception as error:  # no Triton, no compiler, an old driver: the plain way always works
        _logger.warning("the fused row pass is not used: %s: %s", type(error).__name__, error)
        return False


def agrees(device: torch.device) -> bool:
    """Compare kernel and oracle on a small tile."""
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(8, 3000, generator=generator) * 5).to(device)
    columns = torch.tensor([-1, 0, 2999, 5, -1, 2048, 2047, 7], device=device)
    ours, theirs = z.clone(), z.clone()
    found, expected = fused_rows(ours, ours, columns, 0.7), plain_rows(theirs, theirs, columns, 0.7)
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))
    if not (same and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)):
        _logger.warning("the fused row pass is not used: it does not give PyTorch's result on %s", device)
        return False
    return True
