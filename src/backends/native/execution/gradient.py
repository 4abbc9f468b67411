"""From a loss to parameter gradients: log-probs forward, the loss on detached leaves, its cotangent backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from ....datums.types import Datum
from ....errors import NonFiniteError
from ....losses.base import Counts, Loss, Part
from ....losses.metrics import Metric, combine_metrics, mean, total, wire_metrics
from ...custom import call_custom, custom_cotangents, custom_name
from ...protocol import CustomLoss
from ..causal_lm import CausalLM
from .batching import ScoreRequest
from .deferred_backward import Tape, TapeSettings

__all__ = [
    "Done",
    "Gradient",
    "custom_gradient",
    "evaluate",
    "registered_gradient",
    "require_finite_cotangents",
    "require_finite_logprobs",
    "streams_known",
    "summary",
]


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


class Done(NamedTuple):
    """One batch of whole units (or all, for a function) after its loss: cotangents by datum."""

    cotangents: Mapping[int, Tensor]
    part: Part
    metrics: Mapping[str, Metric]


Evaluate = Callable[[Mapping[int, Tensor]], Done]


def streams_known(model: CausalLM, loss: Loss, requests: Sequence[ScoreRequest]) -> bool:
    """Whether the cotangent can be had in the pass that scores, which saves a trainable head a product."""
    one_target = all(r.targets.dim() == 1 for r in requests)
    return model.head().trainable and loss.gradient_kind in ("constant", "token") and one_target


def registered_gradient(
    model: CausalLM,
    loss: Loss,
    data: Sequence[Datum],
    requests: Sequence[ScoreRequest],
    batches: Sequence[Sequence[Sequence[int]]],
    settings: TapeSettings,
    counts: Counts | None,
) -> Gradient:
    """Stream batches of whole units, each in one or more forwards: forward, loss, backward, and on to the next."""

    def done_with(logprobs: Mapping[int, Tensor]) -> Done:
        return evaluate(loss, {i: data[i] for i in logprobs}, logprobs, counts)

    known = streams_known(model, loss, requests)
    logprobs: dict[int, Tensor] = {}
    done: list[Done] = []
    for forwards in batches:
        tape = Tape(model, settings)
        at_once = known and len(forwards) == 1  # a group cut in two knows its coefficients only at the end
        if at_once:
            chosen = [requests[i] for i in forwards[0]]
            constant = loss.gradient_kind == "constant"
            scored = tape.pull_known(forwards[0], chosen, lambda found: done_with(found).cotangents, constant)
        else:
            for batch in forwards:
                tape.add(batch, [requests[i] for i in batch])
            scored = tape.logprobs()
        require_finite_logprobs(scored, requests)
        result = done_with(scored)
        require_finite_cotangents(result.cotangents, requests, loss.name)
        if not at_once:
            tape.backward(result.cotangents)
        done.append(result._replace(metrics={**result.metrics, **tape.metrics()}))
        logprobs |= {i: x.cpu() for i, x in scored.items()}
    return summary(done, [logprobs[i] for i in range(len(data))])


def custom_gradient(
    model: CausalLM,
    function: CustomLoss,
    data: Sequence[Datum],
    requests: Sequence[ScoreRequest],
    batches: Sequence[Sequence[int]],
    settings: TapeSettings,
) -> Gradient:
    """One forward of everything with its graphs kept, the function on detached leaves, one backward."""
    tape = Tape(model, settings)
    for batch in batches:
        tape.add(batch, [requests[i] for i in batch])
    scored = tape.logprobs()
    leaves = [scored[i].cpu().clone().requires_grad_() for i in range(len(data))]
    loss, metrics = call_custom(function, data, leaves)
    cotangents = dict(enumerate(custom_cotangents(function, loss, leaves)))
    require_finite_cotangents(cotangents, requests, custom_name(function))
    tape.backward(cotangents)
    part = Part("loss", loss.detach(), "none", 1.0)
    own = {"loss": total(float(loss.detach())), **tape.metrics()}
    found = summary([Done(cotangents, part, own)], [x.detach() for x in leaves])
    return Gradient(found.logprobs, {**found.metrics, **metrics}, found.tokens, found.sequences, "none", 1.0)


def evaluate(loss: Loss, data: Mapping[int, Datum], logprobs: Mapping[int, Tensor], counts: Counts | None) -> Done:
    """Evaluate a loss on detached leaves; return dL/dlogprob of every datum."""
    order = sorted(data)  # neighbours stay neighbours
    leaf = torch.cat([logprobs[i] for i in order]).requires_grad_()
    sizes = [len(logprobs[i]) for i in order]
    with torch.enable_grad():
        output = loss.evaluate(loss.batch([data[i] for i in order], torch.split(leaf, sizes)), counts)
        part = output.deferred() if counts is None else Part("loss", output.loss, "none", 1.0)
        (cotangent,) = torch.autograd.grad(part.numerator, leaf)
    return Done(dict(zip(order, torch.split(cotangent, sizes), strict=True)), part, output.metrics)


def summary(done: Sequence[Done], logprobs: list[Tensor]) -> Gradient:
    """Put the batches of a call together."""
    cotangents = [c.detach().cpu() for d in done for c in d.cotangents.values()]
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


def require_finite_logprobs(logprobs: Mapping[int, Tensor], requests: Sequence[ScoreRequest]) -> None:
    """Raise `NonFiniteError` with the datum and token of the first log-prob that is not finite."""
    for i, values in sorted(logprobs.items()):
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            token = int(bad.nonzero()[0, 0])
            raise NonFiniteError(
                f"datum {i}: the model gives target token {token} (id {requests[i].targets[token].tolist()}) the log-prob "
                f"{values[bad][0].item()}; its weights or activations have overflowed"
            )


def require_finite_cotangents(cotangents: Mapping[int, Tensor], requests: Sequence[ScoreRequest], name: str) -> None:
    """Raise `NonFiniteError` with the datum and token of the first cotangent that is not finite."""
    for i, cotangent in sorted(cotangents.items()):
        bad = ~torch.isfinite(cotangent)
        if bool(bad.any()):
            token = int(bad.nonzero()[0, 0])
            raise NonFiniteError(
                f"datum {i}: {name} has the gradient {cotangent[bad][0].item()} at target token {token} "
                f"(id {requests[i].targets[token].tolist()}); select untrained positions with torch.where, not by a product"
            )
