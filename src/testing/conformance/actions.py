"""Short ways to say what is asked of a backend, and what the answers show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from ...backends.protocol import CustomLoss, NormalizationMode, TrainerBackend
from ...backends.types import AdamParams
from ...datums.types import Datum
from ...losses import Loss
from ..under_test import BackendUnderTest
from .check import Broken

__all__ = [
    "Action",
    "as_function",
    "custom",
    "descent",
    "each",
    "gradient",
    "gradient_norm",
    "must_raise",
    "pairs_of",
    "scaled",
    "scores",
    "step",
    "train",
]

Action: TypeAlias = Callable[[TrainerBackend], object]

_EPS: Final = 1e6  # beside it every gradient is small, so that a step is lr / eps times the gradient
_MOVED: Final = 0.02  # nats
_TRIES: Final = 16
_FIRST: Final = "descent cross_entropy {}"


def gradient(
    data: Sequence[Datum], loss: str | Loss = "cross_entropy", config: Mapping[str, Any] | None = None
) -> Action:
    """Accumulate the gradient of a registered loss."""
    return lambda backend: backend.forward_backward(data, loss, config).result()


def custom(data: Sequence[Datum], function: CustomLoss) -> Action:
    """Accumulate the gradient of a function."""
    return lambda backend: backend.forward_backward_custom(data, function).result()


def step(params: AdamParams, mode: NormalizationMode = None) -> Action:
    """Make a step."""
    return lambda backend: backend.optim_step(params, mode).result()


def each(*actions: Action) -> Action:
    """Do several things, one after the other, and wait for each."""

    def work(backend: TrainerBackend) -> None:
        for action in actions:
            action(backend)

    return work


def train(
    params: AdamParams,
    calls: Sequence[Sequence[Datum]],
    loss: str | Loss = "cross_entropy",
    config: Mapping[str, Any] | None = None,
) -> Action:
    """Accumulate the gradients of several calls and make one step."""
    return each(*(gradient(call, loss, config) for call in calls), step(params))


def scaled(data: Sequence[Datum], factor: float) -> list[Datum]:
    """Return the data with all weights multiplied by a factor."""
    return [d.with_inputs(weights=factor * d.loss_fn_inputs["weights"].to_torch()) for d in data]


def pairs_of(data: Sequence[Datum]) -> list[list[Datum]]:
    """Return calls of two neighbours each."""
    return [list(data[i : i + 2]) for i in range(0, len(data), 2)]


def scores(backend: TrainerBackend, data: Sequence[Datum]) -> list[Tensor]:
    """Return the log-probs of a forward, one tensor per datum."""
    return [output["logprobs"].to_torch() for output in backend.forward(data).result().loss_fn_outputs]


def as_function(loss: Loss) -> CustomLoss:
    """Return a plain function that computes a registered loss."""

    def function(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        value, metrics = loss(data, logprobs)
        return value, dict(metrics)

    return function


def plain_descent(size: float) -> AdamParams:
    """Return parameters with which an update is ``size`` times the gradient: no moments, and a large eps."""
    return AdamParams(learning_rate=_EPS * size, beta1=0.0, beta2=0.0, eps=_EPS)


def descent(
    under_test: BackendUnderTest, loss: str | Loss = "cross_entropy", config: Mapping[str, Any] | None = None
) -> AdamParams:
    """Return parameters of a step along a loss's gradient: log-probs answer in proportion, by an amount that is easy to see.

    AdamW's own first step is nearly the same for a gradient and for twice the gradient; this one is not.

    Raises:
        Broken: no size of a step moves the log-probs.
    """

    def measure() -> AdamParams:
        wanted = max(_MOVED, 10 * under_test.nats)
        params = plain_descent(1e-4) if name == _FIRST else descent(under_test)
        for _ in range(_TRIES):
            with under_test.backend() as backend:
                before = under_test.probe(backend)
                train(params, [under_test.data()], loss, config)(backend)
                moved = float((under_test.probe(backend) - before).abs().max())
            if wanted / 2 <= moved <= 2 * wanted:
                return params
            grown = min(max(wanted / moved, 1e-3), 1e3) if moved > 0 else 1e3
            params = replace(params, learning_rate=grown * params.learning_rate)
        raise Broken(
            f"no step along the gradient of {loss} moves log-probs by about {wanted:g} nats, whatever its size"
        )

    name = f"descent {loss} {dict(config or {})}"
    found: AdamParams = under_test.once(name, measure)
    return found


def gradient_norm(under_test: BackendUnderTest) -> float:
    """Return the norm of the summed cross-entropy gradient of the training data.

    It is the metric ``grad_norm`` where there is one. Otherwise a step of size s along the gradient lowers the loss by s times
    the squared norm.
    """

    def measure() -> float:
        params, data = descent(under_test), under_test.data()
        with under_test.backend() as backend:
            before = _weighted(scores(backend, data), data)
            gradient(data)(backend)
            told = backend.optim_step(params).result().metrics.get("grad_norm")
            after = _weighted(scores(backend, data), data)
        if told is not None:
            return told
        return float((max(after - before, 0.0) * params.eps / params.learning_rate) ** 0.5)

    return float(under_test.once("gradient norm", measure))


def _weighted(logprobs: Sequence[Tensor], data: Sequence[Datum]) -> float:
    weights = [d.loss_fn_inputs["weights"].to_torch().double() for d in data]
    return float(torch.stack([(w * x.double()).sum() for w, x in zip(weights, logprobs, strict=True)]).sum())


def must_raise(kind: type[Exception], what: str, work: Callable[[], object]) -> None:
    """Check that something is refused.

    Raises:
        Broken: it is not, or by another error.
    """
    try:
        work()
    except kind:
        return
    except Exception as error:
        raise Broken(f"{what}: {type(error).__name__} instead of {kind.__name__}: {error}") from error
    raise Broken(f"{what} did not raise {kind.__name__}")
