"""Failures: a call that fails adds nothing, is not forgotten, and is not applied twice by trying again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from ....backends.protocol import TrainerBackend
from ....backends.types import AdamParams
from ....datums.types import Datum, ModelInput
from ....errors import ClosedError, PrecedingOperationFailed, PullbackError, UnretrievedFailureError
from ...under_test import BackendUnderTest, closing
from ..actions import descent, each, gradient, must_raise, step, train
from ..check import Evidence, NotApplicable, check, require

__all__ = ["FAILURES"]

_NO_TOKEN: Final = 10_000_000  # an id that no vocabulary has
_ANOTHERS: Final = AdamParams(learning_rate=3e-2, beta1=0.5, weight_decay=0.3, grad_clip_norm=0.1)


@check("an error that is dropped with its future, so that the step lacks a batch and nobody knows")
def failed_calls_block_the_step(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """After a failed call no step is made until its error has been retrieved; the failed call adds no gradient."""
    data, params = under_test.data(), descent(under_test, "dpo")

    def script(fail: bool, backend: TrainerBackend) -> None:
        backend.forward_backward(data, "dpo").result()
        if fail:
            half_a_pair = backend.forward_backward(data[:1], "dpo")
            make_step = partial(backend.optim_step, params)
            must_raise(PrecedingOperationFailed, "a step after a failure", lambda: make_step().result())
            require(isinstance(half_a_pair.exception(), PullbackError), "half a pair did not fail")
        backend.optim_step(params).result()

    undisturbed, after_failure = (under_test.after(partial(script, fail)) for fail in (False, True))
    words = "a step after a failure whose error was retrieved"
    evidence.note(difference=under_test.require_same(words, undisturbed, after_failure))


@check("a batch that is applied datum by datum, so that those before the bad one have been added")
def bad_datums_add_nothing(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A call with one bad datum is refused as a whole: the good ones in it add no gradient."""
    data, params = under_test.data(), descent(under_test)
    expected = under_test.after(train(params, [data[2:]]))
    tokens = ModelInput.from_ints([*data[0].model_input.to_ints()[:-1], _NO_TOKEN])
    bad = [*data[:2], Datum(tokens, data[0].loss_fn_inputs)]

    def script(backend: TrainerBackend) -> None:
        error = backend.forward_backward(bad, "cross_entropy").exception()
        require(error is not None, f"token {_NO_TOKEN} is in no vocabulary, and the call succeeded")
        evidence.note(refusal=f"{type(error).__name__}: {error}".splitlines()[0][:120])
        each(gradient(data[2:]), step(params))(backend)

    found = under_test.after(script)
    evidence.note(difference=under_test.require_same("a good call after one with a bad datum", expected, found))


@check("requests that are run again where they are sent again: no idempotency by model and seq_id")
def retries_apply_once(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A request whose answer is lost, or that arrives twice, takes effect once."""
    if under_test.unreliable is None:
        raise NotApplicable("there is no network between the caller and this backend")
    data = under_test.data()
    # A gradient that is added twice shows where the step is in proportion to it, a step that is made twice by its momentum.
    script = each(train(descent(under_test), [data[:2]]), train(under_test.params, [data[2:]]))
    expected = under_test.after(script)
    with under_test.unreliable() as backend:
        script(backend)
        found = under_test.probe(backend)
    words = "two steps over a network that loses answers and delivers twice"
    evidence.note(difference=under_test.require_same(words, expected, found))


@check("a config key or an input that is ignored without a word")
def mistakes_are_refused(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Unknown losses and keys, missing inputs, bad tokens and functions without a gradient raise and change nothing."""
    data = under_test.data()
    only_targets = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
    short_weights = [data[0].with_inputs(weights=[1.0])]
    with under_test.backend() as backend:
        train_by_name, train_custom = backend.forward_backward, backend.forward_backward_custom
        before = under_test.probe(backend)
        mistakes: dict[str, Callable[[], Any]] = {
            "an unknown loss": lambda: train_by_name(data, "gpro").result(),
            "an unknown key": lambda: train_by_name(data, "dpo", {"btea": 1.0}).result(),
            "a missing input": lambda: train_by_name(only_targets, "dpo").result(),
            "short weights": lambda: train_by_name(short_weights, "cross_entropy").result(),
            "empty data": lambda: train_by_name([], "cross_entropy").result(),
            "a detached function": lambda: train_custom(data, lambda d, x: (x[0].sum().detach(), {})).result(),
            "a vector": lambda: train_custom(data, lambda d, x: (x[0], {})).result(),
        }
        for what, mistake in mistakes.items():
            must_raise(PullbackError, what, mistake)
        evidence.note(refused=len(mistakes))
        require(torch.equal(before, under_test.probe(backend)), "a refused call changed the weights")


@check("errors that nobody hears of")
def close_reports_failures(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Closing a backend raises an exception that was never retrieved; a closed backend refuses calls."""
    backend = under_test.make()
    unknown_loss = backend.forward_backward(under_test.data(), "gpro")
    must_raise(UnretrievedFailureError, "close with an unretrieved exception", backend.close)
    must_raise(ClosedError, "a call after close", lambda: backend.forward(under_test.data()).result())
    require(unknown_loss.exception() is not None, "an unknown loss did not fail")


@check("gradients, configs or hyperparameters that are shared by all models of a server, or batched together")
def models_are_isolated(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Another model's traffic on the same service, between every two calls and of other configs, changes no update."""
    data, params = under_test.data(), under_test.params
    expected = under_test.after(each(train(params, [data[:2]], "ppo"), train(params, [data[2:]], "ppo")))
    other_config = {"clip_low_threshold": 0.01, "clip_high_threshold": 100.0}
    with under_test.backend() as backend, closing(under_test.make()) as other:
        futures: list[Any] = []
        for call, steps in ((data[:2], (backend, other)), (data[2:], (other, backend))):
            futures.append(other.forward_backward(under_test.data(seed=2), "ppo", other_config))
            futures.append(backend.forward_backward(call, "ppo"))
            futures += [one.optim_step(params if one is backend else _ANOTHERS) for one in steps]
        for future in futures:
            future.result()
        found = under_test.probe(backend)
    evidence.note(difference=under_test.require_same("with another model's calls between", expected, found))


FAILURES: Final = (
    failed_calls_block_the_step,
    bad_datums_add_nothing,
    retries_apply_once,
    mistakes_are_refused,
    close_reports_failures,
    models_are_isolated,
)
