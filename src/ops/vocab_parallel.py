"""Log-probs of chosen tokens where each process has some rows of the head, and none has its whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import PullbackError, RanksDifferError, ShapeError, UnsupportedError
from .chunked import GradientSums, HeadPass
from .head import Head
from .logprobs import flatten, prepare
from .softmax import TileSoftmax, Transform, softmax_

__all__ = ["DTYPES", "require_told_dtype", "vocab_parallel_logprobs"]

DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ALIKE: Final = (
    "width of the head",
    "number of positions",
    "number of targets per position",
    "dtype of the weight",
    "dtype of the hidden states",
    "scale",
    "softcap",
    "temperature",
    "whether there is a bias",
    "whether hidden states have a gradient",
    "targets (their smallest)",
    "targets (their largest)",
    "targets (their checksum)",
)


def vocab_parallel_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    temperature: float = 1.0,
    memory_budget: int | None = None,
) -> Tensor:
    """Log-prob of each target token, ``l_t - logsumexp(l)`` with ``l = logits / temperature``, of a head cut by rows.

    Rank r of n has rows ``V_0 + ... + V_(r-1)`` and the next ``V_r`` of the vocabulary. All ranks have the same hidden states
    and targets, get the same log-probs, and must give them the same cotangent, as they do where each evaluates the whole loss.
    With ``s_r`` the log-sum-exp over a rank's rows::

        m = max_r s_r,   logsumexp(l) = m + log sum_r exp(s_r - m)
        d hidden = sum_r d logits_r @ W_r,   d W_r = d logits_r^T @ hidden,   d bias_r = sum_i d logits_r

    The backward computes each chunk's logits again: 2 N H V_r FLOPs forward and 4 N H V_r backward, 6 where the weight is
    trained. Beside inputs and results a rank holds one chunk of logits, and V_r H fp32 for a trained weight's gradient. Payload
    that it receives in a ring of n, with b bytes a number of the weight, but at least 4:

    =================================  ==========================  =========================================================
    when                               bytes                       what
    =================================  ==========================  =========================================================
    forward                            16 N (3 + K) (n - 1) / n    fp64: maxima; sums with the target, and without; its logits
    backward, if hidden has a gradient 2 b N H (n - 1) / n         the gradient of hidden
    at first                           120 (n - 1)                 what ranks are asked, which must be the same
    =================================  ==========================  =========================================================

    Precision is that of `selected_logprobs`.

    Args:
        hidden: [..., H], any float dtype, the same on every rank.
        head: this rank's rows of the output projection, [V_r, H], and of its bias, [V_r]; there may be none, and another number
            on each rank.
        targets: int64 [...], or [..., K] for K candidates per position; ids of the whole vocabulary, the same on every rank.
        group: the ranks, in the order of their rows; None: all.
        temperature: divides the logits.
        memory_budget: bytes of logits held at once; default as for `selected_logprobs`.

    Returns:
        Log-probs in nats, shape of ``targets``, fp32 (fp64 for an fp64 head), the same on every rank.

    Raises:
        ShapeError: shapes do not fit on this rank, or a target lies outside of the vocabulary.
        ConfigError: temperature or budget is not positive.
        UnsupportedError: a trainable weight is a DTensor, or a dtype is not of floats of 16 bits or more.
        RanksDifferError: ranks are asked different things, or one was refused what it asked.

    Source: the vocabulary-parallel cross entropy of Megatron-LM (Shoeybi et al., arXiv:1909.08053, section 3).
    """
    asked = _ask(hidden, head, targets, temperature, memory_budget)
    sizes = _agree(asked, hidden, group)
    if isinstance(asked, PullbackError):
        raise asked
    first = sum(sizes[: dist.get_rank(group)])
    local = replace(asked, targets=_inside(asked.targets, sum(sizes)) - first)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs: Tensor = _VocabParallelHead.apply(flat, head.weight, head.bias, local, group)  # type: ignore[no-untyped-call]
    return logprobs.reshape(targets.shape)


class _VocabParallelHead(torch.autograd.Function):
    """Sums over ranks forward, and those of the hidden states' gradient backward, which scores again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head_pass: HeadPass,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Score this rank's rows, and join them with those of the others."""
        with torch.autocast(hidden.device.type, enabled=False):
            joined = _join(_own_softmax(head_pass), group)
        ctx.save_for_backward(hidden, weight, bias, joined.lse, joined.one_minus_target, joined.target_logits)
        ctx.head_pass, ctx.group = replace(head_pass, hidden=hidden.new_empty(0)), group
        return joined.logprobs(head_pass.targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        """Score again, pull back, and sum the hidden states' gradient over ranks."""
        hidden, weight, bias, *sums = ctx.saved_tensors
        head_pass, needed = replace(ctx.head_pass, hidden=hidden.detach()), ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            found = _pull(head_pass, TileSoftmax(*sums), cotangent, needed).result()
            of_hidden = found.hidden
            if of_hidden is not None:
                of_hidden = of_hidden.to(head_pass.exact)
                dist.all_reduce(of_hidden, group=ctx.group)
        pairs = ((of_hidden, hidden), (found.weight, weight), (found.bias, bias))
        return *(None if g is None else g.to(x.dtype) for g, x in pairs), None, None


def _own_softmax(head_pass: HeadPass) -> TileSoftmax:
    """Return the softmax of this rank's rows alone."""
    if not len(head_pass.head.weight) or not len(head_pass.hidden):
        return TileSoftmax.empty(head_pass.targets, head_pass.exact, False)
    return TileSoftmax.stack([softmax_(z, replace(tile, partial=True)) for _, z, tile in head_pass.chunks()])


def _join(own: TileSoftmax, group: dist.ProcessGroup | None) -> TileSoftmax:
    """Return the softmax over all ranks' rows, of which each has some; see `TileSoftmax.join`."""
    highest = own.lse.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    mass = (own.lse - highest).exp()
    sums = torch.cat([mass[:, None], (mass * own.one_minus_target)[:, None], own.target_logits.double()], 1)
    dist.all_reduce(sums, group=group)
    return TileSoftmax(highest + sums[:, 0].log(), sums[:, 1] / sums[:, 0], sums[:, 2:].to(own.target_logits.dtype))


def _pull(head_pass: HeadPass, joined: TileSoftmax, cotangent: Tensor, needed: tuple[bool, bool, bool]) -> GradientSums:
    """Return gradients from this rank's rows."""
    sums = GradientSums(head_pass, *needed)
    if not len(head_pass.head.weight):
        if sums.hidden is not None:
            sums.hidden.zero_()
        return sums
    for at, z, tile in head_pass.chunks():
        softmax_(z, replace(tile, partial=True), _logit_gradient(head_pass.targets[at], joined, cotangent[at], at))
        sums.add(at, tile.hidden, z, z.new_full((len(z),), head_pass.factor))
    return sums


def _logit_gradient(targets: Tensor, joined: TileSoftmax, cotangent: Tensor, chunk: slice) -> Transform:
    """Turn the softmax of this rank's rows into ``sum_k g_k (onehot(t_k) - p)``, p being of all ranks' rows.

    Of one target, ``1 - p`` is summed without it: a subtraction would cancel where the model is confident.
    """
    first = chunk.start

    def transform(p: Tensor, softmax: TileSoftmax, at: slice) -> None:
        rows = slice(first + at.start, first + at.stop)
        g, column = cotangent[at].to(p.dtype), targets[at]
        here = (column >= 0) & (column < p.shape[1])
        place = column.clamp(0, p.shape[1] - 1)
        p.mul_((softmax.lse - joined.lse[rows]).exp()[:, None].to(p.dtype))
        if column.shape[1] == 1:
            given = g * joined.one_minus_target[rows, None].to(p.dtype)
            p.mul_(-g)
        else:
            # The first target's own probability was left out.
            own = (joined.target_logits[rows, :1].double() - joined.lse[rows, None]).exp().to(p.dtype)
            p.scatter_add_(-1, place[:, :1], torch.where(here[:, :1], own, 0.0))
            given = g
            p.mul_(-g.sum(-1, keepdim=True))
        p.scatter_add_(-1, place, torch.where(here, given, 0.0))
        if softmax.slope is not None:
            p.mul_(softmax.slope)

    return transform


def _ask(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, memory_budget: int | None
) -> HeadPass | PullbackError:
    """Return what this rank is asked, or why it is refused: the others must hear of that before it is raised."""
    try:
        flat, chosen, _ = flatten(hidden, head, targets, None, bounded=False)
        require_told_dtype(flat, head)
        if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
            raise ShapeError(
                f"head.bias must be [{len(head.weight)}], as head.weight has rows, got {list(head.bias.shape)}"
            )
        return prepare(flat, head, chosen, temperature, False, memory_budget)
    except PullbackError as error:
        return error


def require_told_dtype(hidden: Tensor, head: Head) -> None:
    """Check that ranks can tell each other the dtypes of hidden states and weight.

    Raises:
        UnsupportedError: they cannot.
    """
    for name, x in (("hidden", hidden), ("head.weight", head.weight)):
        if x.dtype not in DTYPES:
            raise UnsupportedError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")


def _agree(asked: HeadPass | PullbackError, hidden: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """Return the rows that each rank has.

    Raises:
        RanksDifferError: a rank was refused, or ranks are asked different things.
    """
    refused = isinstance(asked, PullbackError)
    alike = [0.0] * len(_ALIKE) if isinstance(asked, PullbackError) else _described(asked, hidden)
    rows = 0 if isinstance(asked, PullbackError) else len(asked.head.weight)
    own = torch.tensor([float(refused), float(rows), *alike], dtype=torch.float64, device=hidden.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    said = [each.tolist() for each in every]
    if refused:
        return []  # the caller raises why
    for rank, theirs in enumerate(said):
        if theirs[0]:
            raise RanksDifferError(
                f"rank {rank} was refused its part of vocab_parallel_logprobs; its own error says why"
            )
        for name, first, other in zip(_ALIKE, said[0][2:], theirs[2:], strict=True):
            if first != other:
                raise RanksDifferError(
                    f"rank {rank} has another {name} than rank 0: {other:g} instead of {first:g}; every rank must be given all "
                    "hidden states and targets, and its own rows of one head"
                )
    return [int(each[1]) for each in said]


def _described(asked: HeadPass, hidden: Tensor) -> list[float]:
    """Return what must be alike on every rank, as numbers."""
    targets, head = asked.targets, asked.head
    place = torch.arange(targets.numel(), device=targets.device) % 8191 + 1
    told = [targets.min(), targets.max(), (targets.flatten() * place).sum() % 2**40] if targets.numel() else [0, 0, 0]
    return [
        float(head.weight.shape[1]),
        *map(float, targets.shape),
        float(DTYPES.index(head.weight.dtype)),
        float(DTYPES.index(hidden.dtype)),
        head.scale,
        -1.0 if head.softcap is None else head.softcap,
        asked.temperature,
        float(head.bias is not None),
        float(torch.is_grad_enabled() and hidden.requires_grad),
        *map(float, told),
    ]


def _inside(targets: Tensor, vocab: int) -> Tensor:
    """Return targets that lie in the vocabulary, as the ranks have agreed on the smallest and the largest.

    Raises:
        ShapeError: they do not.
    """
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ShapeError(
            f"targets must lie in [0, {vocab}), the rows of all ranks, got {int(targets.min())} to {int(targets.max())}"
        )
    return targets
