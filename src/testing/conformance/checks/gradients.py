"""Gradients: of the loss that was asked for, of every trained token, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ....backends.protocol import CustomLoss, TrainerBackend
from ....datums.types import Datum
from ....errors import PullbackError, UnsupportedError
from ....losses import get_loss
from ...under_test import BackendUnderTest
from ..actions import as_function, custom, descent, each, gradient, plain_descent, scaled, scores, step, train
from ..check import Evidence, NotApplicable, check, refused, require
from .definitions import DEFINITIONS, defined
from .means import MEANS
from .scoring import other_targets, with_candidates

__all__ = ["GRADIENTS"]


@check("a mean for a sum, a division too many, a lost sign, or a step that is made twice")
def gradients_match_the_loss(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A step along the gradient lowers the loss by its squared norm, to first order: no factor and no sign is lost."""
    bound = max(0.1, 1.5 * under_test.tolerance)
    exact = under_test.nats < 1e-3  # a step that shows in half precision goes beyond a clip range
    with under_test.backend() as backend:
        for name in ("cross_entropy", "ppo") if exact else ("cross_entropy",):
            data = _on_policy(backend, under_test)
            gradient(data, name)(backend)
            told = backend.optim_step(plain_descent(0.0)).result().metrics
            if "grad_norm" not in told:
                raise UnsupportedError(f"optim_step reports no grad_norm; its metrics: {', '.join(told) or 'none'}")
            norm = told["grad_norm"]
            before = backend.forward(data, name).result().metrics["loss:sum"]
            size = max(1e-3, 10 * under_test.nats - 1e-3) * sum(under_test.lengths) / norm**2
            train(plain_descent(size), [data], name)(backend)
            decrease = before - backend.forward(data, name).result().metrics["loss:sum"]
            ratio = decrease / (size * norm**2)
            evidence.note(**{f"{name}: decrease / prediction": ratio})
            likely = f"the update is {ratio:.4g} times the gradient{under_test.factor_in_words(ratio)}"
            words = f"{name}: the loss fell by {ratio:.3f} times what its gradient says"
            require(abs(ratio - 1) < bound, words, likely)


@check("a slice or a shift that leaves out an end of the sequence")
def every_token_counts(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Trained alone, the first and the last token of a datum each become likelier."""
    datum = under_test.data()[0]
    for position in (0, len(datum.model_input) - 1):
        one_token = datum.with_inputs(weights=torch.eye(len(datum.model_input))[position])
        with under_test.backend() as backend:
            before = scores(backend, [datum])[0][position]
            train(under_test.params, [[one_token]])(backend)
            after = scores(backend, [datum])[0][position]
        evidence.note(**{f"token {position}: rise, nats": float(after - before)})
        require(after > before, f"target token {position} was trained alone and is not likelier than before")


@check("a weighted mean in place of the weighted sum, or weights that become a mask of zeros and ones")
def fractional_weights_scale_gradients(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Four calls with a quarter of the weights are one call with all of them; a weight of 3 is three calls."""
    data, params = under_test.data(), descent(under_test)
    whole = under_test.after(train(params, [data]))
    quarters = under_test.after(train(params, [scaled(data, 0.25)] * 4))
    evidence.note(four_quarters=under_test.require_same("four calls with a quarter of the weights", whole, quarters))
    three = under_test.after(train(params, [data] * 3))
    threefold = under_test.after(train(params, [scaled(data, 3.0)]))
    evidence.note(three_times=under_test.require_same("one call with three times the weights", three, threefold))


@check("weights that are clamped at 0, or divided by their sum: every custom loss sends negative ones")
def negative_weights_are_kept(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Negative weights train away from a token: -w in one call cancels w in another."""
    data, params = under_test.data(), descent(under_test)
    others = other_targets(data, under_test.vocab_size)
    expected = under_test.after(train(params, [others]))
    cancelled = under_test.after(train(params, [data, scaled(data, -1.0), others]))
    evidence.note(difference=under_test.require_same("w, -w and another call", expected, cancelled))


@check("[T, K] targets of which one column is trained, or whose weights are summed")
def candidates_train_like_single_targets(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """The gradient of [T, K] targets is the sum of those of its K columns."""
    columns = [under_test.data(), other_targets(under_test.data(), under_test.vocab_size)]
    params = descent(under_test)
    expected = under_test.after(train(params, columns))
    try:
        together = under_test.after(train(params, [with_candidates(*columns)]))
    except PullbackError as error:
        refused(error, "targets of shape [T, K]")
    evidence.note(difference=under_test.require_same("targets [T, 2]", expected, together))


@check("a name that is ignored, so that every request trains cross-entropy, or another formula under this name")
def named_losses_match_their_definitions(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A loss by name trains as a function does whose cotangent is the closed form of that loss."""
    data = under_test.data()
    for name, config in DEFINITIONS:
        params = descent(under_test, name, config)
        expected = under_test.after(each(custom(data, defined(name, config)), step(params)))
        try:
            named = under_test.after(train(params, [data], name, config))
        except PullbackError as error:
            refused(error, f"{name} by name")
        words = f"{name} {dict(config)}" if config else name
        evidence.note(**{words: under_test.require_same(f"{words} by name", expected, named)})


@check("a config that is kept from the first request of a batch, or read at the end of it")
def configs_are_per_request(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Two calls with different clip ranges, sent without waiting, are each clipped by their own."""
    data, params = under_test.data(), descent(under_test, "ppo")
    ranges = (
        {"clip_low_threshold": 0.01, "clip_high_threshold": 100.0},
        {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01},
    )

    def clipped(*clips: Mapping[str, float]) -> Tensor:
        calls = zip((data[:2], data[2:]), clips, strict=True)
        return under_test.after(each(*(custom(call, defined("ppo", clip)) for call, clip in calls), step(params)))

    def pipelined(backend: TrainerBackend) -> None:
        futures: list[Any] = [backend.forward_backward(data[:2], "ppo", ranges[0])]
        futures += [backend.forward_backward(data[2:], "ppo", ranges[1]), backend.optim_step(params)]
        for future in futures:
            future.result()

    expected, exchanged = clipped(*ranges), clipped(*ranges[::-1])
    apart = float((exchanged - expected).norm() / (expected - under_test.start()).norm())
    evidence.note(with_the_ranges_exchanged=apart)
    if apart < 2 * under_test.tolerance:
        raise NotApplicable(f"exchanging the ranges changes {apart:.2g} of the update, too little to be seen")
    try:
        found = under_test.after(pipelined)
    except PullbackError as error:
        refused(error, "ppo with clip ranges")
    evidence.note(difference=under_test.require_same("two ppo calls with ranges of their own", expected, found))


@check("a custom loss that is divided, or scaled, on its way to the backward")
def functions_match_registered_losses(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A custom function gives the update of the registered loss that it computes."""
    data = under_test.data()
    for name, config in MEANS.items():
        params = descent(under_test, name, config)
        expected = under_test.after(train(params, [data], name, config))
        function: CustomLoss = as_function(get_loss(name, config))
        found = under_test.after(each(custom(data, function), step(params)))
        evidence.note(**{name: under_test.require_same(f"{name} as a function", expected, found)})


@check("cotangents that are rounded, clamped, shifted by a token, or given to another datum")
def cotangents_arrive_as_they_are(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A function with cotangents c, of both signs, trains as cross-entropy with weights -c."""
    generator = torch.Generator().manual_seed(2)
    data, params = under_test.data(), descent(under_test)
    cotangents = [torch.randn(length, generator=generator) for length in under_test.lengths]

    def function(_: Any, logprobs: Any) -> Any:
        return torch.stack([(c * x).sum() for c, x in zip(cotangents, logprobs, strict=True)]).sum(), {}

    weighted = [d.with_inputs(weights=-c) for d, c in zip(data, cotangents, strict=True)]
    expected = under_test.after(train(params, [weighted]))
    found = under_test.after(each(custom(data, function), step(params)))
    evidence.note(difference=under_test.require_same("a function with given cotangents", expected, found))


@check("a forward, or a sampler, that adds into the gradient")
def scoring_adds_no_gradient(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """A forward between two gradient calls adds nothing to the step."""
    data, params = under_test.data(), descent(under_test)
    expected = under_test.after(train(params, [data]))

    def scored(backend: TrainerBackend) -> None:
        scores(backend, other_targets(data, under_test.vocab_size))
        gradient(data)(backend)
        backend.forward(data, "ppo").result()
        step(params)(backend)

    evidence.note(difference=under_test.require_same("with forwards between", expected, under_test.after(scored)))


def _on_policy(backend: TrainerBackend, under_test: BackendUnderTest) -> list[Datum]:
    """Return the data with the policy's own log-probs, as if it had been sampled from it: no ratio is clipped."""
    data = under_test.data()
    return [d.with_inputs(logprobs=x) for d, x in zip(data, scores(backend, data), strict=True)]


GRADIENTS: Final = (
    gradients_match_the_loss,
    every_token_counts,
    fractional_weights_scale_gradients,
    negative_weights_are_kept,
    candidates_train_like_single_targets,
    named_losses_match_their_definitions,
    configs_are_per_request,
    functions_match_registered_losses,
    cotangents_arrive_as_they_are,
    scoring_adds_no_gradient,
)
