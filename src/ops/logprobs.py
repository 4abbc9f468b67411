"""Log-probs of chosen tokens from hidden states, without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError, UnsupportedError
from .autograd import FrozenHead, OnePassHead, RecomputedHead
from .chunked import HeadPass
from .head import Head, require_whole_head

__all__ = [
    "chunk_bytes",
    "flatten",
    "gathered",
    "head_logits",
    "logprob_surrogate",
    "prepare",
    "selected_logprobs",
]

_CPU_BYTES, _GPU_BYTES = 12 * 2**20, 512 * 2**20


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return the logits of ``hidden`` [N, H] in fp32 or better, [N, V]: all of them, so only for a few positions."""
    require_whole_head(head)
    product = hidden.to(head.weight.dtype) @ head.weight.T
    logits = product if product.dtype == torch.float64 else product.float()
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.bias is not None:
        logits = logits + head.bias.to(logits.dtype)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@overload
def selected_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    needed: Tensor | None = None,
    temperature: float = 1.0,
    entropy: Literal[False] = False,
    memory_budget: int | None = None,
) -> Tensor: ...


@overload
def selected_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    needed: Tensor | None = None,
    temperature: float = 1.0,
    entropy: Literal[True],
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def selected_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    needed: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target token, ``l_t - logsumexp(l)`` with ``l = logits / temperature``.

    Which path runs, for N needed positions (FLOPs of the matrix products; bytes beside inputs and results):

    ==========================  ==============  ===============  =================================================
    path                        forward FLOPs   backward FLOPs   bytes
    ==========================  ==============  ===============  =================================================
    nothing needs a gradient    2 N H V         -                one chunk of logits
    frozen head, one target     4 N H V         N H              one chunk, and N H for ``d logprob / d hidden``
    anything else               2 N H V         6 N H V          one chunk; backward: V H fp32 for the weight
    ==========================  ==============  ===============  =================================================

    *Frozen head*: while a chunk's logits are there, each log-prob's own gradient is formed, so that the backward is one
    multiplication by the cotangent, whatever it is and whenever it is known. *Anything else* (trainable head, K targets,
    a gradient through the entropy): the backward computes each chunk's logits again; without a trainable head it takes
    4 N H V. Where the cotangent can be given at once, `logprob_surrogate` does a trainable head in 6 N H V altogether.

    Products run in the weight's dtype (autocast's where it is on); maxima, exponentials and sums in fp32, for an fp64
    head in fp64. Works under activation checkpointing, and on a frozen sharded (DTensor) weight, which is gathered;
    a trainable one belongs inside the forward of the module that FSDP gathers.

    Args:
        hidden: [..., H], any float dtype.
        head: the output projection.
        targets: int64 [...], or [..., K] for K candidates per position.
        needed: bool [...]; positions that are scored. Others cost nothing, read 0.0 and have no gradient.
        temperature: divides the logits.
        entropy: also return the entropy of each position's distribution, nats; differentiable.
        memory_budget: bytes of logits held at once; default 12 MiB on a CPU, 512 MiB on a GPU.

    Returns:
        Log-probs in nats, shape of ``targets``, fp32 (fp64 for an fp64 head); with ``entropy`` also [...].

    Raises:
        ShapeError: shapes do not fit, or a target lies outside the vocabulary.
        ConfigError: temperature or budget is not positive.
        UnsupportedError: a trainable weight is sharded.
    """
    require_whole_head(head)
    flat, chosen, shape = flatten(hidden, head, targets, needed)
    head_pass = prepare(flat, head, chosen, temperature, entropy, memory_budget)
    if torch.is_grad_enabled() and (head.trainable or (flat.requires_grad and chosen.shape[1] > 1)):
        scores = RecomputedHead.apply(flat, head.weight, head.bias, head_pass)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and flat.requires_grad:
        scores = FrozenHead.apply(flat, head_pass)  # type: ignore[no-untyped-call]
    else:
        scores = head_pass.score()[:2]
    logprobs, entropies = _scatter(scores[0], needed, (*shape, chosen.shape[1])), scores[1]
    logprobs = logprobs.reshape(targets.shape)
    return (logprobs, _scatter(entropies, needed, shape)) if entropy else logprobs


def logprob_surrogate(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cotangent: Tensor | Callable[[Tensor, slice], Tensor],
    *,
    temperature: float = 1.0,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum_i g_i logprob_i`` for a cotangent g that is known in the same pass: a trainable head in 6 N H V FLOPs.

    The gradient is complete when the function returns (``V H`` fp32 for the weight); the backward only scales it.

    Args:
        hidden: [N, H].
        head: the output projection.
        targets: int64 [N].
        cotangent: fp32 [N], or a function of a chunk's log-probs and its place among the N that returns the chunk's.
            It is a constant: no gradient flows through it.
        temperature: divides the logits.
        memory_budget: bytes of logits held at once; default as much as the weight's gradient takes.

    Returns:
        The scalar sum, to be differentiated, and the log-probs [N], which are not differentiable.

    Raises:
        ShapeError: shapes do not fit.
        ConfigError: temperature or budget is not positive.
    """
    require_whole_head(head)
    flat, chosen, _ = flatten(hidden, head, targets, None)
    if chosen.shape[1] != 1 or targets.dim() != 1:
        raise ShapeError(f"targets must be [N], one per position, got {tuple(targets.shape)}")
    head_pass = prepare(flat, head, chosen, temperature, False, memory_budget)
    given = cotangent if callable(cotangent) else lambda logprobs, at: cotangent[at]
    surrogate, logprobs = OnePassHead.apply(flat, head.weight, head.bias, head_pass, given)  # type: ignore[no-untyped-call]
    return surrogate, logprobs


def flatten(
    hidden: Tensor, head: Head, targets: Tensor, needed: Tensor | None, bounded: bool = True
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return hidden [N, H] and targets [N, K] of the needed positions, and the shape of all positions.

    Args:
        hidden, head, targets, needed: as for `selected_logprobs`.
        bounded: targets must lie in the head's vocabulary.
    """
    _check_shapes(hidden, head, targets, needed)
    (vocab, width), shape = head.weight.shape, tuple(hidden.shape[:-1])
    candidates = targets.shape[-1] if targets.dim() > len(shape) else 1
    if not candidates:
        raise ShapeError(f"targets must name a token of each position, got {list(targets.shape)}: none of any")
    flat, chosen = hidden.reshape(-1, width), targets.reshape(-1, candidates)
    if needed is not None and not bool(needed.all()):
        flat, chosen = flat[needed.reshape(-1)], chosen[needed.reshape(-1)]
    checked = bounded and not chosen.is_cuda and chosen.numel()
    if checked and not 0 <= int(chosen.min()) <= int(chosen.max()) < vocab:
        raise ShapeError(
            f"targets must lie in [0, {vocab}), got {int(chosen.min())} to {int(chosen.max())}; mark positions without a "
            "target by needed=, not by a token id"
        )
    return flat, chosen, shape


def _check_shapes(hidden: Tensor, head: Head, targets: Tensor, needed: Tensor | None) -> None:
    if head.weight.requires_grad and hasattr(head.weight, "full_tensor"):
        raise UnsupportedError(
            "head.weight is sharded (a DTensor) and trainable: call this inside the forward of the module that FSDP gathers, "
            "where the weight is whole and its gradient is reduced like all others"
        )
    vocab, width = head.weight.shape
    shape = tuple(hidden.shape[:-1])
    if hidden.dim() < 2 or hidden.shape[-1] != width:
        raise ShapeError(
            f"hidden must be [..., {width}] to fit head.weight [{vocab}, {width}], got {list(hidden.shape)}"
        )
    if tuple(targets.shape[: len(shape)]) != shape or targets.dim() > len(shape) + 1 or targets.dtype != torch.int64:
        raise ShapeError(
            f"targets must be int64 {list(shape)} (or with K candidates in a last dimension) for hidden "
            f"{list(hidden.shape)}, got {targets.dtype} {list(targets.shape)}"
        )
    if needed is not None and (tuple(needed.shape) != shape or needed.dtype != torch.bool):
        raise ShapeError(f"needed must be bool {list(shape)}, got {needed.dtype} {list(needed.shape)}")


def prepare(
    flat: Tensor, head: Head, chosen: Tensor, temperature: float, entropy: bool, memory_budget: int | None
) -> HeadPass:
    """Return what stays the same from chunk to chunk; arguments as for `selected_logprobs`."""
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be positive, got {temperature}")
    weight = gathered(head.weight)
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        weight = weight.to(torch.get_autocast_dtype(device))
    if memory_budget is None:
        trained = head.weight.requires_grad and torch.is_grad_enabled()
        memory_budget = chunk_bytes(weight.numel(), trained=trained, gpu=weight.is_cuda)
    if memory_budget < 1:
        raise ConfigError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    bias = None if head.bias is None else gathered(head.bias)
    return HeadPass(
        hidden=flat.detach(),
        head=head._replace(weight=weight, bias=bias),
        targets=chosen,
        temperature=temperature,
        entropy=entropy,
        numbers=max(1, memory_budget // 4),
    )


def chunk_bytes(weight: int, *, trained: bool, gpu: bool) -> int:
    """Return the bytes of logits held at once by default, for a weight of so many numbers: as many as a gradient's, if any."""
    return max(_GPU_BYTES if gpu else _CPU_BYTES, 4 * weight if trained else 0)


def gathered(parameter: Tensor) -> Tensor:
    """Return a parameter detached, and whole where it is sharded (a DTensor)."""
    gather: Any = getattr(parameter, "full_tensor", None)
    return parameter.detach() if gather is None else gather().detach()


def _scatter(values: Tensor, needed: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Put the values of the needed positions into zeros of the whole shape."""
    if needed is None or len(values) == needed.numel():
        return values.reshape(shape)
    at = needed.reshape(-1).nonzero()[:, 0]
    return values.new_zeros(needed.numel(), *values.shape[1:]).index_put((at,), values).reshape(shape)
