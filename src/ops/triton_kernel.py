"""The Triton kernel of `softmax`; importing this module needs Triton."""

# mypy: ignore-errors
import triton
import triton.language as tl

__all__ = ["row_softmax"]


@triton.jit
def row_softmax(z, columns, highest, total, one_minus_target, logits, width, stride, factor, BLOCK: tl.constexpr):
    """One row a program: maximum and sum in one reading; in the second, its softmax without the target, in place."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    column = tl.load(columns + row)
    offsets = tl.arange(0, BLOCK)
    top = tl.full((), -float("inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    for first in range(0, width, BLOCK):
        at = first + offsets
        x = tl.load(z + at, mask=at < width, other=-float("inf")).to(tl.float32) * factor
        new = tl.maximum(top, tl.max(x, 0))
        mass = mass * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    rest = tl.full((), 0.0, tl.float32)
    own = tl.full((), 0.0, tl.float32)
    for first in range(0, width, BLOCK):
        at = first + offsets
        x = tl.load(z + at, mask=at < width, other=-float("inf")).to(tl.float32) * factor
        own += tl.sum(tl.where(at == column, x, 0.0), 0)
        p = tl.where(at == column, 0.0, tl.exp(x - top) / mass)
        rest += tl.sum(p, 0)
        tl.store(z + at, p.to(z.dtype.element_ty), mask=at < width)
    tl.store(highest + row, top)
    tl.store(total + row, mass)
    tl.store(one_minus_target + row, rest)
    tl.store(logits + row, own)
