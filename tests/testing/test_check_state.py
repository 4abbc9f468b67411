"""A loss that differs from call to call: every property that fails by it says so, and state is told from chance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pullback.testing import loss_report
from pullback.testing.losscheck import search

SAID = "called twice on one batch"


@pytest.fixture(autouse=True)
def _little_shrinking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest example is another test's."""
    monkeypatch.setattr(search, "_SHRINKING", 0)


def selected(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0)


def with_a_running_mean() -> Callable[..., Tensor]:
    """Return a policy gradient whose baseline is an average over calls."""
    baseline: list[float] = [0.0]

    def loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        mean = float(selected(advantages, mask).sum() / mask.sum().clamp(min=1))
        baseline[0] = 0.9 * baseline[0] + 0.1 * mean
        return -(selected(advantages - baseline[0], mask) * selected(logprobs, mask)).sum()

    return loss


def with_dropout(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -torch.nn.functional.dropout(selected(logprobs, mask), 0.5).sum()


def shifted(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -selected(logprobs, mask.roll(1, -1)).sum()


def test_state_is_told_from_chance() -> None:
    for loss, cause in ((with_a_running_mean(), "a state between the calls"), (with_dropout, "random numbers inside")):
        result = loss_report(loss, form="padded", only="deterministic", examples=3)["deterministic"]
        assert result.verdict == "failed"
        assert f"Likely cause: {cause}" in result.sentence


def test_comparisons_of_a_loss_with_state() -> None:
    """They fail by the state, and name no other cause; a defect of a loss without state keeps its own."""
    report = loss_report(with_a_running_mean(), form="padded", only=["layouts", "permutation", "splits"], examples=3)
    assert report.failed
    assert all(SAID in result.sentence for result in report.failed)
    assert all(SAID not in result.sentence for result in loss_report(shifted, form="padded", examples=3).failed)
