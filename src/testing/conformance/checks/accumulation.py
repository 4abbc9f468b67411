"""Accumulation: gradients add up until the step, are divided once, and are used up by it."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch

from ....backends.protocol import NormalizationMode, TrainerBackend
from ....backends.types import AdamParams
from ....errors import DoubleNormalizationError, UnsupportedError
from ....losses import CrossEntropy
from ...under_test import BackendUnderTest
from ..actions import descent, each, gradient, must_raise, pairs_of, step, train
from ..check import Evidence, check, require
from .means import MEANS

__all__ = ["ACCUMULATION"]

_MODES: Final[dict[NormalizationMode, str]] = {
    "num_loss_tokens": "token_mean",
    "num_sequences": "sequence_mean_token_sum",
    "auto": "token_mean",  # what a sum over tokens declares
}


@check("each call divided by its own count, or a gradient that is cleared with every request")
def calls_add_up(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """One call or several, in any order, give the same update, for means too (or they are refused)."""
    pairs = pairs_of(under_test.data())
    for name, config in MEANS.items():
        params = descent(under_test, name, config)
        expected = under_test.after(train(params, [under_test.data()], name, config))
        try:
            split = under_test.after(train(params, pairs[::-1], name, config))
        except UnsupportedError:
            evidence.note(**{name: "refused"})
            continue
        words = f"{name} {dict(config)} in {len(pairs)} calls"
        evidence.note(**{name: under_test.require_same(words, expected, split)})


@check("a mean for a sum, each call divided by its own count, or a gradient that is cleared with every request")
def raw_sums_add_up(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """The protocol's own losses are sums: any split into calls, in any order, gives the update of one call."""
    pairs = pairs_of(under_test.data())
    for name in ("cross_entropy", "importance_sampling", "ppo"):
        params = descent(under_test, name)
        expected = under_test.after(train(params, [under_test.data()], name))
        split = under_test.after(train(params, pairs[::-1], name))
        evidence.note(**{name: under_test.require_same(f"{name} in {len(pairs)} calls", expected, split)})


@check("a normalisation that is ignored, applied to each call, or applied on top of a mean")
def one_normalizer(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A raw sum divided at the step is the mean; a mean is not divided again."""

    def script(mean: str, aggregation: str, mode: NormalizationMode, backend: TrainerBackend) -> None:
        params = descent(under_test, "cross_entropy", {"aggregation": mean})
        each(gradient(under_test.data(), CrossEntropy(aggregation)), step(params, mode))(backend)

    for mode, mean in _MODES.items():
        try:
            divided = under_test.after(partial(script, mean, "sum", mode))
        except UnsupportedError as error:
            evidence.note(**{str(mode): f"refused: {error}"})
            continue
        expected = under_test.after(partial(script, mean, mean, None))
        evidence.note(**{str(mode): under_test.require_same(f"sum with {mode}", expected, divided)})
    with under_test.backend() as backend:
        divide_twice = partial(script, "token_mean", "token_mean", "num_loss_tokens", backend)
        must_raise(DoubleNormalizationError, "a mean with num_loss_tokens", divide_twice)


@check("0/0 in a mean over nothing, or an optimizer that steps on momentum alone")
def zero_weights_change_nothing(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """With all weights zero there is no step, and no NaN."""

    def script(backend: TrainerBackend) -> None:
        untrained = [d.with_inputs(weights=torch.zeros(len(d.model_input))) for d in under_test.data()]
        told = backend.forward_backward(untrained, "cross_entropy").result().metrics.get("loss:sum", 0.0)
        require(told == 0.0, f"all weights are 0 and the loss is {told}")
        stepped = backend.optim_step(under_test.params).result().stepped
        require(not stepped, "all weights are 0 and a step was made")

    moved = float((under_test.after(script) - under_test.start()).abs().max())
    evidence.note(moved_nats=moved)
    require(moved == 0.0, "all weights are 0 and the weights changed")


@check("an optimizer that steps on its momentum where there is no gradient")
def empty_steps_change_nothing(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A step without any gradient is an outcome of its own: nothing moves, though the moments are warm."""
    with under_test.backend() as backend:
        train(under_test.params, [under_test.data()])(backend)
        before = under_test.probe(backend)
        outcome = backend.optim_step(under_test.params).result()
        moved = float((under_test.probe(backend) - before).abs().max())
    evidence.note(moved_nats=moved)
    require(not outcome.stepped, "nothing had accumulated and a step was reported")
    require(moved == 0.0, f"nothing had accumulated and log-probs moved by {moved:.2e} nats")


@check("a mask that multiplies, so that 0 times inf is NaN, or weights that a loss does not read")
def masked_inputs_are_ignored(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """What stands at a token of weight 0, junk or sense, has no effect: targets, advantages, log-probs."""
    data = under_test.data()
    dirty_data = [_junk(d, under_test.vocab_size) for d in data]
    for loss in ("cross_entropy", "importance_sampling", "ppo"):
        params = descent(under_test, loss)
        clean = under_test.after(train(params, [data], loss))
        dirty = under_test.after(train(params, [dirty_data], loss))
        evidence.note(**{loss: under_test.require_same(f"{loss} with junk where the weight is 0", clean, dirty)})


@check("a gradient that is not cleared by the step")
def steps_clear_gradients(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """The gradient of one step has no part in the next."""
    data, params = under_test.data(), descent(under_test)
    first, second = data[:2], data[2:]
    expected = under_test.after(train(params, [second]))
    still = AdamParams(1e-12, params.beta1, params.beta2, params.eps)
    found = under_test.after(each(train(still, [first]), train(params, [second])))
    evidence.note(difference=under_test.require_same("after a step on another gradient", expected, found))


@check("a gradient that is kept although it was discarded")
def discarded_gradients_are_gone(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """What was discarded has no part in the next step."""
    data, params = under_test.data(), descent(under_test)
    expected = under_test.after(train(params, [data[2:]]))

    def discarding(backend: TrainerBackend) -> None:
        gradient(data[:2])(backend)
        backend.discard_gradients()
        train(params, [data[2:]])(backend)

    evidence.note(difference=under_test.require_same("after discarding", expected, under_test.after(discarding)))


@check("operations that run in parallel, or one kind before the other, where they were sent without waiting")
def operations_keep_their_order(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Sent without waiting, operations take effect in the order of their submission."""
    data, slow, fast = under_test.data(), under_test.params, AdamParams(learning_rate=5e-2, eps=1e-6)
    calls = ((data[:2], slow), (data[2:], fast))
    expected = under_test.after(each(*(train(params, [call]) for call, params in calls)))

    def pipelined(backend: TrainerBackend) -> None:
        futures: list[Any] = [backend.forward(data)]
        for call, params in calls:
            futures += [
                backend.forward_backward(call, "cross_entropy"),
                backend.optim_step(params),
                backend.forward(data),
            ]
        results = [future.result() for future in futures[::-1]][::-1]
        scored = [torch.cat([o["logprobs"].to_torch() for o in results[i].loss_fn_outputs]) for i in (0, 3, 6)]
        steps = [float((b - a).abs().max()) for a, b in pairwise(scored)]
        evidence.note(moved_by_the_first_step=steps[0], moved_by_the_second_step=steps[1])
        require(min(steps) > 0, "a forward that was sent after a step does not see it, or one sent before it does")

    evidence.note(difference=under_test.require_same("two steps sent at once", expected, under_test.after(pipelined)))


def _junk(datum: Any, vocab_size: int) -> Any:
    inputs = {key: value.to_torch().clone() for key, value in datum.loss_fn_inputs.items()}
    masked = inputs["weights"] == 0
    inputs["target_tokens"] = torch.where(masked, (inputs["target_tokens"] + 5) % vocab_size, inputs["target_tokens"])
    inputs["advantages"] = torch.where(masked, 1e6, inputs["advantages"])
    inputs["logprobs"] = torch.where(masked, -200.0, inputs["logprobs"])
    return datum.with_inputs(**inputs)


ACCUMULATION: Final = (
    calls_add_up,
    raw_sums_add_up,
    one_normalizer,
    zero_weights_change_nothing,
    empty_steps_change_nothing,
    masked_inputs_are_ignored,
    steps_clear_gradients,
    discarded_gradients_are_gone,
    operations_keep_their_order,
)
