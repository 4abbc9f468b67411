"""Means through forward_backward_custom: our service divides them once, at the step, as it does those that go by name."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import distance, make_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS, adapter, finished, gradient_body, new_model, rest, served, twin
from tiers import sampled
from torch import Tensor

from pullback.backends import AdamParams
from pullback.backends.remote import Capabilities
from pullback.datums import Datum
from pullback.errors import ConfigError, DoubleNormalizationError, MixedDenominatorsError, UnsupportedError
from pullback.losses import DPO, GRPO, CrossEntropy

pytestmark = SDK_WARNINGS
PARAMS = AdamParams(learning_rate=1e-2, eps=1e-3)  # large enough that a wrong divisor changes the step
PROTOBUF = {"content-type": "application/x-protobuf"}
# Pairs and groups stay whole: two neighbours.
UNITS = [make_data([6, 5, 7, 4, 3, 8])[i : i + 2] for i in (0, 2, 4)]


def read_by(loss: Any, data: list[Datum]) -> list[Datum]:
    kept = {"target_tokens", *loss.required_inputs, *loss.optional_inputs}
    return [Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k in kept}) for d in data]


def hinge(_: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """A sum in which some tokens have no gradient."""
    return torch.stack([-x[x < x.mean()].sum() for x in logprobs]).sum(), {}


NO_DIVISORS: tuple[Any, ...] = (0, -1, True, math.nan, math.inf, "x", [1], {})
LOSSES = {
    "token_mean": CrossEntropy("token_mean"),
    "sequence_mean": GRPO(aggregation="sequence_mean_token_mean"),
    "dpo": DPO(0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@given(
    cuts=st.lists(st.integers(1, 2), unique=True, max_size=2).map(sorted), custom=st.lists(st.booleans(), min_size=3)
)
@example(cuts=[1, 2], custom=[True, True, True])
@example(cuts=[1, 2], custom=[True, False, True])
@settings(max_examples=2, suppress_health_check=list(HealthCheck))
def test_any_split_is_one_mean(name: str, cuts: list[int], custom: list[bool], models: Any, connect: Any) -> None:
    """One or several calls, through the function's verb, after the first also by name: the native update and its divisor."""
    loss, bounds = LOSSES[name], [0, *cuts, 3]
    remote = connect()
    native = twin(models, remote.trainer)
    calls = [[d for unit in UNITS[a:b] for d in unit] for a, b in itertools.pairwise(bounds)]
    for i, data in enumerate(calls):
        native.forward_backward(read_by(loss, data), loss).result()
        verb = remote.forward_backward_custom if custom[i] or i == 0 else remote.forward_backward
        verb(read_by(loss, data), loss).result()
    steps = [backend.optim_step(PARAMS).result() for backend in (native, remote)]
    assert steps[1].divided_by == pytest.approx(steps[0].divided_by)
    assert steps[1].metrics["grad_norm"] == pytest.approx(steps[0].metrics["grad_norm"], rel=1e-4)
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-4


@pytest.mark.parametrize("mode", ["num_loss_tokens", "num_sequences", 7.5, None])
def test_functions_are_normalised_there_as_natively(connect: Any, models: Any, mode: Any) -> None:
    """Two calls of a function, tokens without a gradient included: the same divisor and the same step."""
    remote = connect()
    native = twin(models, remote.trainer)
    for backend in (native, remote):
        for unit in UNITS[:2]:
            backend.forward_backward_custom(unit, hinge).result()
    steps = [backend.optim_step(PARAMS, mode).result() for backend in (native, remote)]
    assert steps[1].divided_by == pytest.approx(steps[0].divided_by)
    assert steps[1].metrics["grad_norm"] == pytest.approx(steps[0].metrics["grad_norm"], rel=1e-4)
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-4


def test_what_cannot_be_one_mean(connect: Any) -> None:
    """By name first and then counted here, a sum beside it, a second division, another loss: each is refused and says why."""
    loss = CrossEntropy("token_mean")
    first, second = (read_by(loss, unit) for unit in UNITS[:2])
    remote = connect()
    remote.forward_backward(first, loss).result()
    with pytest.raises(UnsupportedError, match="both to forward_backward_custom"):
        remote.forward_backward_custom(second, loss).result()
    assert remote.optim_step(PARAMS).result().stepped
    remote.forward_backward_custom(first, loss).result()
    with pytest.raises(MixedDenominatorsError):
        remote.forward_backward_custom(second, hinge).result()
    with pytest.raises(MixedDenominatorsError):
        remote.forward_backward_custom(UNITS[1], DPO(0.3)).result()
    for mode in ("num_loss_tokens", 3.0):
        with pytest.raises(DoubleNormalizationError):
            remote.optim_step(PARAMS, mode).result()
    assert remote.optim_step(PARAMS, "auto").result().normalization == "tokens over 1 call, at the service"


def test_a_service_that_takes_no_divisor(connect: Any) -> None:
    """Negative control: an older one of ours, and a plain one, still divide one call by its own count, and refuse two."""
    ours = connect().capabilities
    assert ours.takes_divisor
    loss = CrossEntropy("token_mean")
    for capabilities in (replace(ours, takes_divisor=False), Capabilities()):
        remote = connect(capabilities=capabilities)
        remote.forward_backward_custom(read_by(loss, UNITS[0]), loss).result()
        with pytest.raises(UnsupportedError, match="cannot divide at optim_step"):
            remote.forward_backward_custom(read_by(loss, UNITS[1]), loss).result()
        assert remote.optim_step(PARAMS).result().normalization == "cross_entropy by its own count"
        remote.forward_backward_custom(UNITS[0], hinge).result()
        with pytest.raises(UnsupportedError, match="defer_backward"):
            remote.optim_step(PARAMS, 3.0).result()


@pytest.mark.parametrize("mode", sampled(NO_DIVISORS, (-1, "x")), ids=repr)
def test_numbers_that_divide_nothing(url: str, connect: Callable[..., Any], mode: Any) -> None:
    """Refused by both sides, in words; the accumulation stays, and a right one divides it."""
    with rest(url, KEY) as http:
        _, made = new_model(http)
        model = made["model_id"]
        body = gradient_body(model, 1, "cross_entropy")
        finished(http, http.post("forward_backward", content=body, headers=PROTOBUF).json()["request_id"])
        norms = []
        for i, given_mode in enumerate([mode, 2.0]):
            step = {"model_id": model, "seq_id": 2 + i, "optimizer_params": {"type": "adamw", "learning_rate": 1e-3}}
            step["optimizer_params"]["grad_accumulation_normalization"] = given_mode
            norms.append(finished(http, http.post("optim_step", content=json.dumps(step)).json()["request_id"]))
        assert norms[0]["category"] == "user"
        assert "grad_accumulation_normalization" in norms[0]["error"]
        assert norms[1]["metrics"]["divided_by"] == 2.0
    if isinstance(mode, (int, float, str)):
        remote = connect()
        remote.forward_backward_custom(UNITS[0], hinge).result()
        with pytest.raises(ConfigError, match="grad_accumulation_normalization"):
            remote.optim_step(PARAMS, mode).result()
