"""What every backend promises, as checks that use nothing but its verbs. Run them on your own backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from ..backends.protocol import CustomLoss, NormalizationMode, TrainerBackend
from ..backends.types import AdamParams
from ..datums.types import Datum
from ..errors import (
    ClosedError,
    DoubleNormalizationError,
    PrecedingOperationFailed,
    PullbackError,
    UnretrievedFailureError,
    UnsupportedError,
)
from ..losses import CrossEntropy, Loss, get_loss
from .under_test import BackendUnderTest

__all__ = ["PROMISES", "check_backend"]

_MEANS: Final[Mapping[str, Mapping[str, Any]]] = {
    "cross_entropy": {"aggregation": "token_mean"},
    "grpo": {"kl_beta": 0.1},
    "dpo": {},
    "orpo": {},
}


def scores_are_aligned(under_test: BackendUnderTest) -> None:
    """Each target has one log-prob, at most 0; the order of datums does not matter; scoring changes nothing."""
    with under_test.backend() as backend:
        data = under_test.data()
        scores = _scores(backend, data)
        assert [len(x) for x in scores] == list(under_test.lengths), "forward: not one log-prob per target token"
        assert all(bool((x <= 0).all() and x.isfinite().all()) for x in scores), "forward: these are no log-probs"
        for i, (x, again) in enumerate(zip(scores, _scores(backend, data[::-1])[::-1], strict=True)):
            assert torch.allclose(x, again, atol=1e-4), f"forward: datum {i} depends on the others"


def calls_add_up(under_test: BackendUnderTest) -> None:
    """One call or several, in any order, give the same update, for means too (or they are refused)."""
    pairs = [under_test.data()[i : i + 2] for i in range(0, len(under_test.lengths), 2)]
    for name, config in _MEANS.items():
        expected = under_test.after(partial(_train, under_test, [under_test.data()], name, config))
        try:
            split = under_test.after(partial(_train, under_test, pairs[::-1], name, config))
        except UnsupportedError:
            continue
        under_test.require_same(f"{name} {dict(config)} in {len(pairs)} calls", expected, split)


def functions_match_registered_losses(under_test: BackendUnderTest) -> None:
    """A custom function gives the update of the registered loss that it computes."""

    def custom_step(function: CustomLoss, backend: TrainerBackend) -> None:
        backend.forward_backward_custom(under_test.data(), function).result()
        backend.optim_step(under_test.params).result()

    for name, config in _MEANS.items():
        expected = under_test.after(partial(_train, under_test, [under_test.data()], name, config))
        custom = under_test.after(partial(custom_step, _as_function(get_loss(name, config))))
        under_test.require_same(f"{name} as a function", expected, custom)


def gradients_match_the_loss(under_test: BackendUnderTest) -> None:
    """A step along the gradient lowers the loss by its squared norm, to first order: no factor and no sign is lost."""
    data = under_test.data()
    with under_test.backend() as backend:
        for name in ("cross_entropy", "ppo"):
            backend.forward_backward(data, name).result()
            norm = backend.optim_step(_plain_descent(0.0)).result().metrics["grad_norm"]
            before = backend.forward(data, name).result().metrics["loss:sum"]
            size = 1e-3 * sum(under_test.lengths) / norm**2
            backend.forward_backward(data, name).result()
            backend.optim_step(_plain_descent(size)).result()
            decrease = before - backend.forward(data, name).result().metrics["loss:sum"]
            ratio = decrease / (size * norm**2)
            assert 0.9 < ratio < 1.1, f"{name}: the loss fell by {ratio:.3f} times what its gradient says"


def every_token_counts(under_test: BackendUnderTest) -> None:
    """Trained alone, the first and the last token of a datum each become likelier."""
    datum = under_test.data()[0]
    for position in (0, len(datum.model_input) - 1):
        one_token = datum.with_inputs(weights=torch.eye(len(datum.model_input))[position])
        with under_test.backend() as backend:
            before = _scores(backend, [datum])[0][position]
            _train(under_test, [[one_token]], "cross_entropy", None, backend)
            after = _scores(backend, [datum])[0][position]
            assert after > before, f"target token {position} was trained alone and is not likelier than before"


def one_normalizer(under_test: BackendUnderTest) -> None:
    """A raw sum divided at the step is the mean; a mean is not divided again."""

    def script(aggregation: str, mode: NormalizationMode, backend: TrainerBackend) -> None:
        backend.forward_backward(under_test.data(), CrossEntropy(aggregation)).result()
        backend.optim_step(under_test.params, mode).result()

    modes: dict[NormalizationMode, str] = {
        "num_loss_tokens": "token_mean",
        "num_sequences": "sequence_mean_token_sum",
    }
    for mode, mean in modes.items():
        try:
            divided = under_test.after(partial(script, "sum", mode))
        except UnsupportedError:
            continue
        under_test.require_same(f"sum with {mode}", under_test.after(partial(script, mean, None)), divided)
    with under_test.backend() as backend:
        divide_twice = partial(script, "token_mean", "num_loss_tokens", backend)
        _must_raise(DoubleNormalizationError, "a mean with num_loss_tokens", divide_twice)


def zero_weights_change_nothing(under_test: BackendUnderTest) -> None:
    """With all weights zero there is no step, and no NaN."""
    start = under_test.after(lambda _: None)

    def script(backend: TrainerBackend) -> None:
        untrained = [d.with_inputs(weights=torch.zeros(len(d.model_input))) for d in under_test.data()]
        metrics = backend.forward_backward(untrained, "cross_entropy").result().metrics
        assert metrics["loss:sum"] == 0.0, f"all weights are 0 and the loss is {metrics['loss:sum']}"
        assert not backend.optim_step(under_test.params).result().stepped, "all weights are 0 and a step was made"

    assert torch.equal(start, under_test.after(script)), "all weights are 0 and the weights changed"


def failed_calls_block_the_step(under_test: BackendUnderTest) -> None:
    """After a failed call no step is made until its error has been retrieved; the failed call adds no gradient."""
    data = under_test.data()

    def script(fail: bool, backend: TrainerBackend) -> None:
        backend.forward_backward(data, "dpo").result()
        if fail:
            half_a_pair = backend.forward_backward(data[:1], "dpo")
            step = partial(backend.optim_step, under_test.params)
            _must_raise(PrecedingOperationFailed, "a step after a failure", lambda: step().result())
            assert isinstance(half_a_pair.exception(), PullbackError), "half a pair did not fail"
        backend.optim_step(under_test.params).result()

    undisturbed, after_failure = (under_test.after(partial(script, fail)) for fail in (False, True))
    under_test.require_same("a step after a failure whose error was retrieved", undisturbed, after_failure)


def mistakes_are_refused(under_test: BackendUnderTest) -> None:
    """Unknown losses and keys, missing inputs, bad tokens and functions without a gradient raise and change nothing."""
    data = under_test.data()
    only_targets = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
    short_weights = [data[0].with_inputs(weights=[1.0])]
    with under_test.backend() as backend:
        train, train_custom = backend.forward_backward, backend.forward_backward_custom
        before = under_test.probe(backend)
        mistakes: dict[str, Callable[[], Any]] = {
            "an unknown loss": lambda: train(data, "gpro").result(),
            "an unknown key": lambda: train(data, "dpo", {"btea": 1.0}).result(),
            "a missing input": lambda: train(only_targets, "dpo").result(),
            "short weights": lambda: train(short_weights, "cross_entropy").result(),
            "empty data": lambda: train([], "cross_entropy").result(),
            "a detached function": lambda: train_custom(data, lambda d, x: (x[0].sum().detach(), {})).result(),
            "a vector": lambda: train_custom(data, lambda d, x: (x[0], {})).result(),
        }
        for what, mistake in mistakes.items():
            _must_raise(PullbackError, what, mistake)
        assert torch.equal(before, under_test.probe(backend)), "a refused call changed the weights"


def checkpoints_hold_everything(under_test: BackendUnderTest) -> None:
    """A run resumed with the optimizer continues as if uninterrupted; without the optimizer it does not."""
    step = partial(_train, under_test, [under_test.data()], "dpo", None)
    with under_test.backend() as backend:
        for _ in range(2):
            step(backend)
        path = backend.save_state("conformance").result().path
        step(backend)
        uninterrupted = under_test.probe(backend)
        backend.load_state_with_optimizer(path).result()
        step(backend)
        resumed = under_test.probe(backend)
        backend.load_state(path).result()
        step(backend)
        cold = under_test.probe(backend)
    under_test.require_same("a resumed run", uninterrupted, resumed)
    assert not torch.allclose(resumed, cold, rtol=0, atol=1e-6), "a cold optimizer makes the same step as a warm one"


def close_reports_failures(under_test: BackendUnderTest) -> None:
    """Closing a backend raises an exception that was never retrieved; a closed backend refuses calls."""
    backend = under_test.make()
    unknown_loss = backend.forward_backward(under_test.data(), "gpro")
    _must_raise(UnretrievedFailureError, "close with an unretrieved exception", backend.close)
    _must_raise(ClosedError, "a call after close", lambda: backend.forward(under_test.data()).result())
    assert unknown_loss.exception() is not None, "an unknown loss did not fail"


PROMISES: Final[Mapping[str, Callable[[BackendUnderTest], None]]] = {
    check.__name__: check
    for check in (
        scores_are_aligned,
        calls_add_up,
        functions_match_registered_losses,
        gradients_match_the_loss,
        every_token_counts,
        one_normalizer,
        zero_weights_change_nothing,
        failed_calls_block_the_step,
        mistakes_are_refused,
        checkpoints_hold_everything,
        close_reports_failures,
    )
}


def check_backend(under_test: BackendUnderTest) -> dict[str, str]:
    """Check every promise; return what is wrong by promise, an empty dict if nothing is.

    Each entry of `PROMISES` can also be run alone, for instance in a parametrized test; it raises AssertionError.
    """
    broken = {}
    for name, check in PROMISES.items():
        try:
            check(under_test)
        except Exception as error:  # a broken backend may raise anything
            broken[name] = f"{type(error).__name__}: {error}"
    return broken


def _train(
    under_test: BackendUnderTest,
    calls: Sequence[Sequence[Datum]],
    loss: str,
    config: Mapping[str, Any] | None,
    backend: TrainerBackend,
) -> None:
    """Accumulate the gradients of several calls and make one step."""
    for call in calls:
        backend.forward_backward(call, loss, config).result()
    backend.optim_step(under_test.params).result()


def _as_function(loss: Loss) -> CustomLoss:
    """Return a plain function that computes a registered loss."""

    def function(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        value, metrics = loss(data, logprobs)
        return value, dict(metrics)

    return function


def _scores(backend: TrainerBackend, data: Sequence[Datum]) -> list[Tensor]:
    return [output["logprobs"].to_torch() for output in backend.forward(data).result().loss_fn_outputs]


def _plain_descent(size: float) -> AdamParams:
    """Parameters with which an update is ``size`` times the gradient: no moments, and a large eps."""
    return AdamParams(learning_rate=1e6 * size, beta1=0.0, beta2=0.0, eps=1e6)


def _must_raise(kind: type[Exception], what: str, work: Callable[[], object]) -> None:
    try:
        work()
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} instead of {kind.__name__}: {error}") from error
    raise AssertionError(f"{what} did not raise {kind.__name__}")
