"""From log-probs to cotangents: a loss, or a user's function, on detached leaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ...errors import LossError, LossTypeError, NonFiniteError, NotDifferentiableError
from ...losses.base import Loss
from ...losses.batch.token_batch import TokenBatch
from ...losses.evaluation.metrics import Metric, combine_metrics, mean, read, total, wire_metrics
from ...losses.evaluation.output import LossOutput, Part
from ..operations.lock import running_loss
from ..protocol import CustomLoss
from .losses import loss_name
from .prepared import PreparedCall

__all__ = [
    "Cotangents",
    "evaluate",
    "evaluate_all",
    "first_not_finite",
    "require_finite_cotangents",
    "signal_metrics",
    "summarize",
]

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Cotangents:
    """dL/dlogprob of some datums of a call, not divided yet.

    Attributes:
        by_datum: one tensor per datum index, of the shape of its targets.
        denominator, count: what they wait to be divided by, and this part's share of it.
        metrics: the loss's.
        own: what a user's function reported, under its own names.
    """

    by_datum: Mapping[int, Tensor]
    denominator: str
    count: float
    metrics: Mapping[str, Metric]
    own: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """With a non-zero cotangent; of several candidates at a token, of any."""
        return sum(int((c != 0).reshape(len(c), -1).any(-1).sum()) for c in self.by_datum.values())

    @property
    def sequences(self) -> int:
        """With a non-zero cotangent."""
        return sum(1 for c in self.by_datum.values() if bool((c != 0).any()))


def evaluate(call: PreparedCall, logprobs: Mapping[int, Tensor]) -> Cotangents:
    """Evaluate the loss of a call on the log-probs of some of its datums, whole units only.

    Raises:
        LossError: a function breaks its contract (it needs all datums), or the loss cannot be computed.
        NonFiniteError: a cotangent is NaN or inf.
    """
    members = sorted(logprobs)  # neighbours stay neighbours
    if call.registered is None:
        found = _of_function(call, [logprobs[i] for i in members])
    else:
        found = _of_registered(call, call.registered, members, logprobs)
    require_finite_cotangents(found.by_datum, call)
    return found


def require_finite_cotangents(cotangents: Mapping[int, Tensor], call: PreparedCall) -> None:
    """Raise `NonFiniteError` with the datum and token of the first cotangent that is not finite."""
    found = first_not_finite(cotangents)
    if found is not None:
        i, token, value = found
        raise NonFiniteError(
            f"datum {i}: {call.name} has the gradient {value} at target token {token} "
            f"(id {call.requests[i].targets[token].tolist()}); select untrained positions with torch.where, not by a product"
        )


def first_not_finite(numbers: Mapping[int, Tensor]) -> tuple[int, int, float] | None:
    """Return datum, target token and value of the first of some numbers per token that is not finite, if any is."""
    for i, values in sorted(numbers.items()):
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            return i, int(bad.nonzero()[0, 0]), values[bad][0].item()
    return None


def evaluate_all(call: PreparedCall, logprobs: Sequence[Tensor]) -> Cotangents:
    """Evaluate the loss of a call on the log-probs of all its datums; see `evaluate`."""
    return evaluate(call, dict(enumerate(logprobs)))


def summarize(parts: Sequence[Cotangents], more: Sequence[Mapping[str, Metric]] = ()) -> Mapping[str, float]:
    """Return the metrics of a call from those of its parts and ``more``, by their names on the wire."""
    metrics = {**combine_metrics([*(part.metrics for part in parts), *more]), **signal_metrics(parts)}
    return {**wire_metrics(metrics), **{key: value for part in parts for key, value in part.own.items()}}


def signal_metrics(parts: Sequence[Cotangents]) -> dict[str, Metric]:
    """Return how large the gradient's signal is, so that a loss of 0 is not taken for a bug."""
    absolute = torch.cat([c.cpu().abs().reshape(-1).double() for p in parts for c in p.by_datum.values()])
    tokens = float(sum(part.tokens for part in parts))
    return read({"cotangent_abs": mean(absolute), "tokens_with_gradient": total(tokens)})


def _of_registered(
    call: PreparedCall, loss: Loss, members: Sequence[int], logprobs: Mapping[int, Tensor]
) -> Cotangents:
    leaf = torch.cat([logprobs[i].detach() for i in members]).requires_grad_()
    with torch.enable_grad():
        with running_loss():
            part, output = _evaluated(call, loss, call.batch(members, leaf))
        (cotangent,) = torch.autograd.grad(part.numerator, leaf)
    if output.problems:
        output.check()
    apart = torch.split(cotangent, [len(logprobs[i]) for i in members])
    return Cotangents(dict(zip(members, apart, strict=True)), part.denominator, float(part.count), output.metrics)


def _evaluated(call: PreparedCall, loss: Loss, batch: TokenBatch) -> tuple[Part, LossOutput]:
    """Return what is to be differentiated: the numerator that is divided later, or with counts the divided loss."""
    if call.counts is None:
        output = loss.undivided(batch)
        return output.deferred(), output
    output = loss.evaluate(batch, call.counts)
    return Part("loss", output.loss, "none", 1.0), output


def _of_function(call: PreparedCall, logprobs: Sequence[Tensor]) -> Cotangents:
    leaves = [x.detach().cpu().clone().requires_grad_() for x in logprobs]
    with torch.enable_grad():
        loss, own = _call_function(call.loss, call.data, leaves)
        _require_no_weight(call, loss)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    if all(g is None for g in gradients):
        raise NotDifferentiableError(_no_path(call.loss))
    filled = [torch.zeros_like(x) if g is None else g.to_dense() for x, g in zip(leaves, gradients, strict=True)]
    return Cotangents(dict(enumerate(filled)), "none", 1.0, {"loss": Metric(float(loss.detach()), 1.0, "sum")}, own)


def _require_no_weight(call: PreparedCall, loss: Tensor) -> None:
    """Check that a function's loss reaches no trained weight but through the log-probs: its gradient would be lost.

    Raises:
        LossError: it does, e.g. by a penalty on the weights, or by a forward pass of its own.
    """
    names = {id(weight): name for name, weight in call.weights.items()}
    reached = [names[id(leaf)] for leaf in _leaves_of(loss) if id(leaf) in names] if names else []
    if reached:
        others = f" and {len(reached) - 1} others" if len(reached) > 1 else ""
        raise LossError(
            f"the loss of {call.name} depends on the weight {reached[0]}{others} that is trained here, beside the log-probs: "
            "only the gradient by the log-probs is taken, so that part of the loss would train nothing. Compute it under "
            "torch.no_grad(), if it is a constant; a penalty on the weights is weight_decay of AdamParams"
        )


def _leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a loss is computed from and that take a gradient."""
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        waiting += [before for before, _ in node.next_functions]


def _call_function(
    function: CustomLoss | Loss, data: Sequence[Any], leaves: list[Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Call a user's function and hold it to its contract.

    Raises:
        LossTypeError: it did not return a scalar tensor and a mapping.
        NotDifferentiableError: the loss has no path to the log-probs.
        NonFiniteError: the loss is NaN or inf.
    """
    name = loss_name(function)
    with running_loss():
        returned = function(data, leaves)
    if not isinstance(returned, tuple) or len(returned) != 2:
        size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise LossTypeError(
            f"{name} must return (loss, metrics), a scalar tensor and a dict, got {type(returned).__name__}{size}"
        )
    loss, metrics = returned
    _check_loss(function, loss, metrics)
    return loss, {str(key): _as_float(str(key), value) for key, value in metrics.items()}


def _check_loss(function: CustomLoss | Loss, loss: object, metrics: object) -> None:
    name = loss_name(function)
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


def _no_path(function: object) -> str:
    return (
        f"the loss of {loss_name(function)} does not depend on any log-prob through differentiable operations, so every "
        "gradient would be zero; compute it from logprobs_list without .detach(), .item(), .data or torch.tensor(...)"
    )


def _as_float(name: str, value: object) -> float:
    """A metric must never cost a training step: what is no number reads NaN."""
    try:
        return float(value.detach()) if isinstance(value, Tensor) else float(value)  # type: ignore[arg-type]  # any object
    except (TypeError, ValueError, RuntimeError):
        _logger.warning("metric %r is no number but %s; reported as NaN", name, type(value).__name__)
        return math.nan
