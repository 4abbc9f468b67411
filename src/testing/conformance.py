"""What every backend must do, as checks that need nothing but its verbs; run them on your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..backends.protocol import TrainerBackend
from ..backends.types import AdamParams
from ..datums.types import Datum
from ..errors import (
    ClosedError,
    DoubleNormalizationError,
    PrecedingOperationFailed,
    PullbackError,
    UnreadFailureError,
    UnsupportedError,
)
from ..losses import CrossEntropy, Loss, get_loss
from .subject import Subject

__all__ = ["PROMISES", "check_backend"]

_MEANS: Final[Mapping[str, Mapping[str, Any]]] = {
    "cross_entropy": {"aggregation": "token_mean"},
    "grpo": {"kl_beta": 0.1},
    "dpo": {},
    "orpo": {},
}


def scores_are_aligned(subject: Subject) -> None:
    """One log-prob per target, none above 0; order does not matter; scoring changes nothing."""
    with subject.backend() as backend:
        data = subject.data()
        outputs = backend.forward(data).result().loss_fn_outputs
        found = [one["logprobs"].to_torch() for one in outputs]
        assert [len(x) for x in found] == list(subject.lengths), "forward: not one log-prob per target token"
        assert all(bool((x <= 0).all()) and bool(x.isfinite().all()) for x in found), "forward: these are no log-probs"
        again = backend.forward(data[::-1]).result().loss_fn_outputs[::-1]
        for i, (x, one) in enumerate(zip(found, again, strict=True)):
            assert torch.allclose(x, one["logprobs"].to_torch(), atol=1e-4), f"forward: datum {i} depends on the others"


def calls_add_up(subject: Subject) -> None:
    """One call or several, in any order: the same update, for means too (or they are refused)."""
    pairs = [subject.data()[i : i + 2] for i in range(0, len(subject.lengths), 2)]
    for name, config in _MEANS.items():

        def script(backend: TrainerBackend, calls: Sequence[list[Datum]], name: str = name) -> None:
            for call in calls:
                backend.forward_backward(call, name, _MEANS[name]).result()
            backend.optim_step(subject.params).result()

        whole = subject.after(lambda b, s=script: s(b, [subject.data()]))  # type: ignore[misc]
        try:
            split = subject.after(lambda b, s=script: s(b, pairs[::-1]))  # type: ignore[misc]
        except UnsupportedError:
            continue
        subject.require_same(f"{name} {dict(config)} in {len(pairs)} calls", whole, split)


def functions_cost_no_meaning(subject: Subject) -> None:
    """A function gives the update of the registered loss with the same maths."""
    for name, config in _MEANS.items():
        loss = get_loss(name, config)

        def function(data: Sequence[Any], logprobs: list[Tensor], loss: Loss = loss) -> tuple[Tensor, dict[str, float]]:
            value, metrics = loss(data, logprobs)
            return value, dict(metrics)

        def by_name(backend: TrainerBackend, name: str = name) -> None:
            backend.forward_backward(subject.data(), name, _MEANS[name]).result()
            backend.optim_step(subject.params).result()

        def by_function(backend: TrainerBackend, function: Any = function) -> None:
            backend.forward_backward_custom(subject.data(), function).result()
            backend.optim_step(subject.params).result()

        subject.require_same(f"{name} as a function", subject.after(by_name), subject.after(by_function))


def gradients_are_the_losses(subject: Subject) -> None:
    """A step along the gradient lowers the loss by its squared norm, to first order: no factor and no sign is lost."""
    with subject.backend() as backend:
        for name in ("cross_entropy", "ppo"):
            data = subject.data()

            def value(name: str = name, data: list[Datum] = data) -> float:
                return backend.forward(data, name).result().metrics["loss:sum"]

            backend.forward_backward(data, name).result()
            # No moments and a large eps: the update is learning_rate / eps times the gradient.
            still = AdamParams(learning_rate=0.0, beta1=0.0, beta2=0.0, eps=1e6)
            norm = backend.optim_step(still).result().metrics["grad_norm"]
            before, size = value(), 1e-3 * sum(subject.lengths) / norm**2
            backend.forward_backward(data, name).result()
            moving = AdamParams(learning_rate=1e6 * size, beta1=0.0, beta2=0.0, eps=1e6)
            backend.optim_step(moving).result()
            fallen = (before - value()) / (size * norm**2)
            assert 0.9 < fallen < 1.1, f"{name}: the loss fell by {fallen:.3f} times what its gradient says"


def every_token_counts(subject: Subject) -> None:
    """Trained alone, the first and the last token of a datum each become likelier."""
    datum = subject.data()[0]
    for place in (0, len(datum.model_input) - 1):
        alone = datum.with_inputs(weights=torch.eye(len(datum.model_input))[place])
        with subject.backend() as backend:

            def logprob(place: int = place) -> float:
                return float(backend.forward([datum]).result().loss_fn_outputs[0]["logprobs"].to_torch()[place])

            before = logprob()
            backend.forward_backward([alone], "cross_entropy").result()
            backend.optim_step(subject.params).result()
            assert logprob() > before, f"target token {place} was trained alone and is not likelier than before"


def one_normalizer(subject: Subject) -> None:
    """A raw sum divided at the step is the mean; a mean is not divided again."""
    sums = {"num_loss_tokens": "token_mean", "num_sequences": "sequence_mean_token_sum"}

    def script(aggregation: str, mode: Any) -> Callable[[TrainerBackend], object]:
        def run(backend: TrainerBackend) -> None:
            backend.forward_backward(subject.data(), CrossEntropy(aggregation)).result()
            backend.optim_step(subject.params, mode).result()

        return run

    for mode, mean in sums.items():
        try:
            divided = subject.after(script("sum", mode))
        except UnsupportedError:
            continue
        subject.require_same(f"sum with {mode}", subject.after(script(mean, None)), divided)
    with subject.backend() as backend:
        backend.forward_backward(subject.data(), CrossEntropy("token_mean")).result()
        _must_raise(
            DoubleNormalizationError,
            "a mean with num_loss_tokens",
            lambda: backend.optim_step(subject.params, "num_loss_tokens").result(),
        )


def nothing_trained_changes_nothing(subject: Subject) -> None:
    """With all weights zero there is no step, and no NaN."""
    start = subject.after(lambda _: None)

    def script(backend: TrainerBackend) -> None:
        silent = [d.with_inputs(weights=torch.zeros(len(d.model_input))) for d in subject.data()]
        metrics = backend.forward_backward(silent, "cross_entropy").result().metrics
        assert metrics["loss:sum"] == 0.0, f"all weights are 0 and the loss is {metrics['loss:sum']}"
        assert not backend.optim_step(subject.params).result().stepped, "all weights are 0 and a step was made"

    assert torch.equal(start, subject.after(script)), "all weights are 0 and the weights changed"


def failures_are_felt(subject: Subject) -> None:
    """After a failed gradient no step is made until its error is read; then training goes on as if it had not been."""
    good, bad = subject.data(), subject.data()[:1]

    def script(backend: TrainerBackend, fail: bool) -> None:
        backend.forward_backward(good, "dpo").result()
        if fail:
            failed = backend.forward_backward(bad, "dpo")
            _must_raise(
                PrecedingOperationFailed,
                "a step after a failure",
                lambda: backend.optim_step(subject.params).result(),
            )
            assert isinstance(failed.exception(), PullbackError), "half a pair did not fail"
        backend.optim_step(subject.params).result()

    clean, after = (subject.after(lambda b, f=fail: script(b, f)) for fail in (False, True))  # type: ignore[misc]
    subject.require_same("a step after a failure that was read", clean, after)


def mistakes_are_refused(subject: Subject) -> None:
    """Unknown losses and keys, missing inputs, bad tokens and functions without a gradient raise and change nothing."""
    data = subject.data()
    bare = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
    with subject.backend() as backend:
        before = subject.probe(backend)
        mistakes: dict[str, Callable[[], Any]] = {
            "an unknown loss": lambda: backend.forward_backward(data, "gpro"),
            "an unknown key": lambda: backend.forward_backward(data, "dpo", {"btea": 1.0}),
            "a missing input": lambda: backend.forward_backward(bare, "dpo"),
            "short weights": lambda: backend.forward_backward([data[0].with_inputs(weights=[1.0])], "cross_entropy"),
            "empty data": lambda: backend.forward_backward([], "cross_entropy"),
            "a detached function": lambda: backend.forward_backward_custom(
                data, lambda d, x: (x[0].sum().detach(), {})
            ),
            "a vector": lambda: backend.forward_backward_custom(data, lambda d, x: (x[0], {})),
        }
        for words, mistake in mistakes.items():
            _must_raise(PullbackError, words, lambda m=mistake: m().result())  # type: ignore[misc]
        assert torch.equal(before, subject.probe(backend)), "a refused call changed the weights"


def checkpoints_hold_everything(subject: Subject) -> None:
    """Uninterrupted = resumed with the optimizer, and both differ from a cold optimizer."""

    def step(backend: TrainerBackend) -> None:
        backend.forward_backward(subject.data(), "dpo").result()
        backend.optim_step(subject.params).result()

    with subject.backend() as backend:
        for _ in range(2):
            step(backend)
        path = backend.save_state("conformance").result().path
        step(backend)
        uninterrupted = subject.probe(backend)
        found = []
        for load in (backend.load_state_with_optimizer, backend.load_state):
            load(path).result()
            step(backend)
            found.append(subject.probe(backend))
    resumed, cold = found
    subject.require_same("a resumed run", uninterrupted, resumed)
    assert not torch.allclose(resumed, cold, rtol=0, atol=1e-6), "a cold optimizer makes the same step as a warm one"


def the_end_is_honest(subject: Subject) -> None:
    """A closed backend refuses work; a failure that nobody read is raised by close."""
    backend = subject.make()
    failed = backend.forward_backward(subject.data(), "gpro")
    _must_raise(UnreadFailureError, "close with an unread failure", backend.close)
    _must_raise(ClosedError, "a call after close", lambda: backend.forward(subject.data()).result())
    assert failed.exception() is not None, "an unknown loss did not fail"


PROMISES: Final[Mapping[str, Callable[[Subject], None]]] = {
    check.__name__: check
    for check in (
        scores_are_aligned,
        calls_add_up,
        functions_cost_no_meaning,
        gradients_are_the_losses,
        every_token_counts,
        one_normalizer,
        nothing_trained_changes_nothing,
        failures_are_felt,
        mistakes_are_refused,
        checkpoints_hold_everything,
        the_end_is_honest,
    )
}


def check_backend(subject: Subject) -> dict[str, str]:
    """Examine a backend; return what is wrong, by promise (empty: nothing).

    Each entry of `PROMISES` can be run alone, e.g. in a parametrized test; it raises AssertionError.
    """
    found = {}
    for name, check in PROMISES.items():
        try:
            check(subject)
        except Exception as error:  # whatever a broken backend raises is a finding
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _must_raise(kind: type[Exception], words: str, work: Callable[[], object]) -> None:
    try:
        work()
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{words}: {type(error).__name__} instead of {kind.__name__}: {error}") from error
    raise AssertionError(f"{words} did not raise {kind.__name__}")
