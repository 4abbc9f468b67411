"""What check_loss may be given: modules, partial functions and methods; and what is said of that which cannot be called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.errors import ConfigError
from pullback.testing import LossReport, check_loss, loss_report


class PolicyGradient(torch.nn.Module):
    """A module, as losses often are, with a parameter of its own."""

    def __init__(self, sign: float = -1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(sign, dtype=torch.float64))

    def forward(self, logprobs: Tensor, advantages: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        gain = torch.where(mask, advantages, 0.0) * torch.where(mask, logprobs, 0.0)
        return self.scale * gain.sum() / temperature


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **named: function(*args, **named)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(function)(undecorated(function))


def looked_at(loss: Any, **options: Any) -> LossReport:
    return loss_report(loss, only=["direction", "influence"], examples=3, shrink=False, **options)


@pytest.mark.parametrize(
    "loss",
    [
        PolicyGradient(),
        PolicyGradient().forward,
        functools.partial(PolicyGradient().forward, temperature=2.0),
        decorated(PolicyGradient().forward),
    ],
    ids=["module", "method", "partial", "decorated"],
)
def test_whatever_can_be_called(loss: Any) -> None:
    """The arguments are those of what it calls in the end."""
    assert not looked_at(loss).failed


def test_a_module_is_checked_by_its_name() -> None:
    """With its arguments and options as a function has them, and found wrong where it is."""
    report = looked_at(PolicyGradient(1.0), arguments={"temperature": 2.0})
    assert report.loss == "PolicyGradient"
    assert [result.property for result in report.failed] == ["direction"]
    with pytest.raises(ConfigError, match="'temprature', which PolicyGradient does not take"):
        check_loss(PolicyGradient(), arguments={"temprature": 2.0})


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (PolicyGradient, "the class PolicyGradient: give an object of it"),
        (undecorated(PolicyGradient().forward), "takes no log-probs by a known name"),
        (lambda **named: named["logprobs"], "a decorator needs functools.wraps"),
        (lambda: torch.zeros(()), r"<lambda>\(\) takes no log-probs"),
    ],
    ids=["class", "undecorated", "keywords", "nothing"],
)
def test_what_cannot_be_told(loss: Any, words: str) -> None:
    """Refused with what to do, instead of failing every property."""
    with pytest.raises(ConfigError, match=words):
        check_loss(loss)


def test_a_loss_that_is_taken_for_one_of_datums() -> None:
    """Two arguments of unknown names are datums and log-probs: where that fails, the report says what was given."""

    def by_other_names(likelihoods: Tensor, chosen_mask: Tensor) -> Tensor:
        return -torch.where(chosen_mask.bool(), likelihoods, 0.0).sum()

    (result,) = loss_report(by_other_names, examples=2).results
    assert "It was given a list of datums and the list of their log-probs" in result.sentence
    assert "names that are known (logprobs, mask, advantages)" in result.sentence


def test_an_input_that_no_datum_has() -> None:
    """The KeyError has the name that was asked for."""

    def of_a_teacher(data: Any, logprobs: Any) -> Any:
        return sum((datum.loss_fn_inputs["teacher"] * x).sum() for datum, x in zip(data, logprobs, strict=True)), {}

    (result,) = loss_report(of_a_teacher, examples=2).results
    assert "KeyError: 'teacher'" in result.sentence
