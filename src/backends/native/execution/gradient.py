"""From a prepared call to parameter gradients: log-probs forward, the loss on detached leaves, its cotangents backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar, final

import torch
from torch import Tensor

from ....errors import NonFiniteError
from ....losses.evaluation.metrics import Metric
from ....losses.evaluation.output import LossOutput
from ....losses.evaluation.streaming import TokenStream
from ...calls.cotangents import Cotangents, evaluate, first_not_finite, require_finite_cotangents, summarize
from ...calls.prepared import PreparedCall
from ...calls.requests import ScoreRequest
from ...engine import Gradient
from ...operations.lock import running_loss
from ..causal_lm import CausalLM
from .batching import MicroBatch
from .deferred_backward import DeferredBackward
from .memory import GraphSettings
from .scaling import GradientScale

T = TypeVar("T")

__all__ = [
    "NOTHING",
    "Streamed",
    "gradient_of",
    "require_finite_logprobs",
    "streamed",
    "streams_in_one_pass",
    "summary",
]

NOTHING: Final = Cotangents({}, "none", 0.0, {})  # of a forward that stands for no datum


def streams_in_one_pass(model: CausalLM, call: PreparedCall) -> bool:
    """Whether the cotangent can be had in the pass that scores, which saves a trainable head a product."""
    kind = call.gradient_kind
    one_target = all(r.targets.dim() == 1 for r in call.requests)
    head = model.head()
    return head.trainable and head.group is None and kind in ("constant", "token") and one_target


class LossRunner(Protocol):
    """Runs what happens between a forward and a backward: the loss, and the checks of what it gives."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


def _run_here(work: Callable[[], T], /) -> T:
    return work()


@final
@dataclass(frozen=True, eq=False)
class Streamed:
    """What came of some batches of a call.

    Attributes:
        parts: the cotangents of each batch.
        logprobs: by datum, on the CPU.
        graph_metrics: what the graphs of each batch held.
    """

    parts: Sequence[Cotangents]
    logprobs: Mapping[int, Tensor]
    graph_metrics: Sequence[Mapping[str, Metric]]


def gradient_of(
    model: CausalLM,
    call: PreparedCall,
    batches: Sequence[Sequence[MicroBatch]],
    settings: GraphSettings,
    scale: GradientScale,
) -> Gradient:
    """Add the gradient of a call, given as batches of whole units; see `streamed`."""
    done = streamed(model, call, batches, settings, scale)
    return summary(call, done.parts, done.logprobs, done.graph_metrics)


def streamed(
    model: CausalLM,
    call: PreparedCall,
    batches: Sequence[Sequence[MicroBatch]],
    settings: GraphSettings,
    scale: GradientScale,
    run_loss: LossRunner = _run_here,
) -> Streamed:
    """Stream batches of whole units, each in one or more forwards: forward, loss, backward, and on to the next.

    Args:
        model: the model; gradients go to ``parameter.grad``.
        call: the call.
        batches: for a function, one batch of everything.
        settings: how graphs are retained.
        scale: of the cotangents; gradients are to be divided by it.
        run_loss: evaluates the loss of each batch; ranks agree there on how it went.
    """
    one_pass = streams_in_one_pass(model, call) and not scale.needed
    logprobs: dict[int, Tensor] = {}
    parts, graph_metrics = list[Cotangents](), list[Mapping[str, Metric]]()
    for forwards in batches:
        graphs = DeferredBackward(model, settings)
        # A group cut in two knows its coefficients only at the end.
        if one_pass and len(forwards) == 1:
            scored, cotangents = _in_one_pass(call, graphs, forwards[0], run_loss)
        else:
            scored, cotangents = _in_two_acts(call, graphs, forwards, scale, run_loss)
        parts.append(cotangents)
        graph_metrics.append(graphs.metrics())
        logprobs |= {i: x.cpu() for i, x in scored.items()}
    return Streamed(parts, logprobs, graph_metrics)


def _in_two_acts(
    call: PreparedCall,
    graphs: DeferredBackward,
    forwards: Sequence[MicroBatch],
    scale: GradientScale,
    run_loss: LossRunner,
) -> tuple[dict[int, Tensor], Cotangents]:
    """Score everything, evaluate the loss, go back."""
    for batch in forwards:
        graphs.add(batch)
    scored = graphs.logprobs()

    def loss() -> Cotangents:
        require_finite_logprobs(scored, call.requests)
        return evaluate(call, scored) if scored else NOTHING

    cotangents = run_loss(loss)
    graphs.backward(cotangents.by_datum, scale.choose(cotangents.by_datum))
    return scored, cotangents


def _in_one_pass(
    call: PreparedCall, graphs: DeferredBackward, batch: MicroBatch, run_loss: LossRunner
) -> tuple[dict[int, Tensor], Cotangents]:
    """Score, evaluate and go back a chunk of tokens at a time."""
    loss, index = call.registered, batch.index
    assert loss is not None, "see streams_in_one_pass"
    if batch.stands_for_none:
        scored = graphs.one_pass(batch, torch.zeros(len(index.at), device=index.at.device))
        return scored, run_loss(lambda: NOTHING)
    dtype = torch.float64 if graphs.exact else torch.float32
    given = torch.zeros(index.shape, dtype=dtype, device=index.at.device)
    stream = _InPass(lambda: TokenStream(loss, call.batch(batch.members, given), call.counts))

    def cotangent(logprobs: Tensor, at: slice) -> Tensor:
        given[index.at[at]] = stream.cotangent(logprobs, index.at[at])
        return given[index.at[at]]

    scored = graphs.one_pass(batch, cotangent)

    def finish() -> Cotangents:
        require_finite_logprobs(scored, call.requests)
        skipped = torch.ones_like(given, dtype=torch.bool).index_fill(0, index.at, False).nonzero()[:, 0]
        stream.cotangent(given[skipped], skipped)
        return _cotangents_of(call, batch.apart(given), stream.output())

    return scored, run_loss(finish)


def _cotangents_of(call: PreparedCall, by_datum: dict[int, Tensor], output: LossOutput) -> Cotangents:
    """Return what the loss has given, once it is known to be sound."""
    require_finite_cotangents(by_datum, call)
    if output.problems:
        output.check()
    part = output.deferred()
    denominator, count = (part.denominator, float(part.count)) if call.counts is None else ("none", 1.0)
    return Cotangents(by_datum, denominator, count, output.metrics)


@final
class _InPass:
    """A loss that is asked in the middle of a pass. What it raises there is kept until the pass is over.

    Other processes may run the same pass, and would wait for this one in the next layer.
    """

    def __init__(self, make: Callable[[], TokenStream]) -> None:
        self._failure: Exception | None = None
        self._stream: TokenStream | None = None
        try:
            self._stream = make()
        except Exception as failure:
            self._failure = failure

    def cotangent(self, logprobs: Tensor, at: Tensor) -> Tensor:
        """Return those of some tokens; 0 once the loss has failed."""
        if self._stream is not None and self._failure is None:
            try:
                with running_loss():
                    return self._stream.cotangent(logprobs, at)
            except Exception as failure:
                self._failure = failure
        return torch.zeros_like(logprobs)

    def output(self) -> LossOutput:
        """Return the value of the loss, or raise what it has raised."""
        if self._failure is not None:
            raise self._failure
        assert self._stream is not None
        return self._stream.output()


def summary(
    call: PreparedCall,
    parts: Sequence[Cotangents],
    logprobs: Mapping[int, Tensor],
    more: Sequence[Mapping[str, Metric]],
) -> Gradient:
    """Return the result of a call from its parts, whose log-probs and cotangents together are of every datum."""
    return Gradient(
        output=call.output([logprobs[i].cpu() for i in range(len(call.data))], summarize(parts, more)),
        tokens=sum(part.tokens for part in parts),
        sequences=sum(part.sequences for part in parts),
        denominator=parts[0].denominator,
        count=sum(part.count for part in parts),
        cotangents={i: c.detach() for part in parts for i, c in part.by_datum.items()},
    )


def require_finite_logprobs(logprobs: Mapping[int, Tensor], requests: Sequence[ScoreRequest]) -> None:
    """Raise `NonFiniteError` with the datum and token of the first log-prob that is not finite."""
    found = first_not_finite(logprobs)
    if found is not None:
        i, token, value = found
        raise NonFiniteError(
            f"datum {i}: the model gives target token {token} (id {requests[i].targets[token].tolist()}) the log-prob "
            f"{value}; its weights or activations have overflowed"
        )
