"""From a loss to parameter gradients: log-probs forward, the loss on detached leaves, its cotangent backward."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ...datums.types import Datum
from ...errors import LossTypeError, NonFiniteError, NotDifferentiableError
from ...losses.base import Counts, Loss, Part
from ...losses.metrics import Metric, combine_metrics, mean, total, wire_metrics
from ..protocol import CustomLoss
from .adapter import ModelAdapter
from .batching import Layout, ScoreRequest
from .scoring import score

__all__ = ["Gradient", "custom_gradient", "registered_gradient"]

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Gradient:
    """What one gradient operation did, beside filling ``parameter.grad``.

    Attributes:
        logprobs: one tensor per datum, detached, on the CPU.
        metrics: ``{"name:reduction": value}``.
        tokens, sequences: with a non-zero cotangent.
        denominator, count: what the gradient waits to be divided by.
    """

    logprobs: Sequence[Tensor]
    metrics: Mapping[str, float]
    tokens: int
    sequences: int
    denominator: str
    count: float


class _Done(NamedTuple):
    """One micro-batch (or function) after its loss: cotangents by datum."""

    cotangents: list[Tensor]
    part: Part
    metrics: Mapping[str, Metric]


def registered_gradient(
    model: ModelAdapter,
    loss: Loss,
    data: Sequence[Datum],
    requests: Sequence[ScoreRequest],
    batches: Sequence[Sequence[int]],
    layout: Layout,
    counts: Counts | None,
) -> Gradient:
    """Stream micro-batches of whole units: forward, loss, backward, and on to the next."""
    logprobs: dict[int, Tensor] = {}
    done: list[_Done] = []
    for batch in batches:
        packed = score(model, [requests[i] for i in batch], layout)
        leaf = packed.detach().requires_grad_()
        leaves = _split(leaf, [requests[i] for i in batch])
        _require_finite_logprobs(leaves, batch, requests)
        result = _evaluate(loss, [data[i] for i in batch], leaf, leaves, counts)
        _require_finite_cotangents(result.cotangents, batch, requests, loss.name)
        torch.autograd.backward(packed, torch.cat(result.cotangents))
        done.append(result)
        logprobs |= dict(zip(batch, _split(leaf.detach().cpu(), [requests[i] for i in batch]), strict=True))
    return _summary(done, [logprobs[i] for i in range(len(data))])


def custom_gradient(
    model: ModelAdapter,
    function: CustomLoss,
    data: Sequence[Datum],
    requests: Sequence[ScoreRequest],
    batches: Sequence[Sequence[int]],
    layout: Layout,
) -> Gradient:
    """One forward of everything with its graphs kept, the function on detached leaves, one backward."""
    graphs = [score(model, [requests[i] for i in batch], layout) for batch in batches]
    pieces: dict[int, Tensor] = {}
    for batch, packed in zip(batches, graphs, strict=True):
        parts = _split(packed.detach().cpu(), [requests[i] for i in batch])
        pieces |= dict(zip(batch, parts, strict=True))
    leaves = [pieces[i].clone().requires_grad_() for i in range(len(data))]
    loss, metrics = call_custom(function, data, leaves)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    if all(g is None for g in found):
        raise NotDifferentiableError(_no_path(function))
    cotangents = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    _require_finite_cotangents(cotangents, range(len(data)), requests, custom_name(function))
    for batch, packed in zip(batches, graphs, strict=True):
        torch.autograd.backward(packed, torch.cat([cotangents[i] for i in batch]).to(packed))
    value = float(loss.detach())
    part = Part("loss", loss.detach(), "none", 1.0)
    summary = _summary([_Done(cotangents, part, {"loss": total(value)})], [x.detach() for x in leaves])
    return Gradient(summary.logprobs, {**summary.metrics, **metrics}, summary.tokens, summary.sequences, "none", 1.0)


def call_custom(function: CustomLoss, data: Sequence[Any], leaves: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Call a user's function and hold it to its contract.

    Raises:
        LossTypeError: it did not return a scalar tensor and a mapping.
        NotDifferentiableError: the loss has no path to the log-probs.
        NonFiniteError: the loss is NaN or inf.
    """
    name = custom_name(function)
    returned = function(data, leaves)
    if not isinstance(returned, tuple) or len(returned) != 2:
        got = (
            f"{type(returned).__name__} of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        )
        raise LossTypeError(f"{name} must return (loss, metrics), a scalar tensor and a dict, got {got}")
    loss, metrics = returned
    if not isinstance(loss, Tensor):
        raise LossTypeError(
            f"{name} returned a {type(loss).__name__} as loss; return a tensor computed from the log-probs "
            "(.item() and float() cut the gradient)"
        )
    if loss.dim() != 0:
        raise LossTypeError(f"{name} returned a loss of shape {tuple(loss.shape)}; reduce it to a scalar (sum or mean)")
    if not isinstance(metrics, Mapping):
        raise LossTypeError(f"{name} returned {type(metrics).__name__} as metrics; return a dict of name to number")
    if not loss.requires_grad:
        raise NotDifferentiableError(_no_path(function))
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"{name} returned the loss {loss.item()}; its metrics: {dict(metrics)}")
    return loss, {str(key): _as_float(str(key), value) for key, value in metrics.items()}


def custom_name(function: object) -> str:
    """What to call a user's function in messages."""
    return str(getattr(function, "__name__", type(function).__name__))


def _no_path(function: object) -> str:
    return (
        f"the loss of {custom_name(function)} does not depend on any log-prob through differentiable operations, so every "
        "gradient would be zero; compute it from logprobs_list without .detach(), .item(), .data or torch.tensor(...)"
    )


def _as_float(name: str, value: object) -> float:
    """A metric must never cost a training step: what is no number reads NaN."""
    try:
        return float(value.detach()) if isinstance(value, Tensor) else float(value)  # type: ignore[arg-type]  # any object
    except (TypeError, ValueError, RuntimeError):
        _logger.warning("metric %r is no number but %s; reported as NaN", name, type(value).__name__)
        return math.nan


def _evaluate(loss: Loss, data: Sequence[Datum], leaf: Tensor, leaves: list[Tensor], counts: Counts | None) -> _Done:
    output = loss.evaluate(loss.batch(data, leaves), counts)
    part = output.deferred() if counts is None else Part("loss", output.loss, "none", 1.0)
    (cotangent,) = torch.autograd.grad(part.numerator, leaf)
    sizes = [x.shape[0] for x in leaves]
    return _Done(list(torch.split(cotangent, sizes)), part, output.metrics)


def _split(packed: Tensor, requests: Sequence[ScoreRequest]) -> list[Tensor]:
    return list(torch.split(packed, [r.length for r in requests]))


def _summary(done: Sequence[_Done], logprobs: list[Tensor]) -> Gradient:
    cotangents = [c.detach().cpu() for d in done for c in d.cotangents]
    active = [int((c != 0).sum()) for c in cotangents]
    absolute = torch.cat([c.abs().reshape(-1).double() for c in cotangents])
    signal = {"cotangent_abs": mean(absolute), "tokens_with_gradient": total(float(sum(active)))}
    metrics = wire_metrics({**combine_metrics(d.metrics for d in done), **signal})
    return Gradient(
        logprobs,
        metrics,
        tokens=sum(active),
        sequences=sum(1 for n in active if n),
        denominator=done[0].part.denominator,
        count=sum(d.part.count for d in done),
    )


def _require_finite_logprobs(leaves: Sequence[Tensor], batch: Sequence[int], requests: Sequence[ScoreRequest]) -> None:
    for i, leaf in zip(batch, leaves, strict=True):
        bad = ~torch.isfinite(leaf.detach())
        if bool(bad.any()):
            token = int(bad.nonzero()[0, 0])
            raise NonFiniteError(
                f"datum {i}: the model gives target token {token} (id {requests[i].targets[token].tolist()}) the log-prob "
                f"{leaf.detach().reshape(bad.shape)[bad][0].item()}; its weights or activations have overflowed"
            )


def _require_finite_cotangents(
    cotangents: Sequence[Tensor], batch: Sequence[int], requests: Sequence[ScoreRequest], name: str
) -> None:
    for i, cotangent in zip(batch, cotangents, strict=True):
        bad = ~torch.isfinite(cotangent)
        if bool(bad.any()):
            token = int(bad.nonzero()[0, 0])
            raise NonFiniteError(
                f"datum {i}: {name} has the gradient {cotangent[bad][0].item()} at target token {token} "
                f"(id {requests[i].targets[token].tolist()}); select untrained positions with torch.where, not by a product"
            )
