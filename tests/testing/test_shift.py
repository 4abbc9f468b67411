"""The property `shift`: which losses it is asked of, and what it lets pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_losses.sound_losses import SOUND
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pullback.errors import ConfigError
from pullback.losses import ORPO, registry
from pullback.testing import check_loss, loss_report
from pullback.testing.losscheck import check_property, loss_under_test
from pullback.testing.losscheck.invariance import MOVES, centred, unweighted
from pullback.testing.strategies import readable_cases

EXAMPLES = 5
ASKED = {
    "cispo": ("anchors",),
    "cross_entropy": ("level",),
    "dpo": ("anchors", "pair sums"),
    "dro": ("anchors",),
    "grpo": ("anchors",),
    "gspo": ("anchors",),
    "importance_sampling": ("anchors",),
    "orpo": (),
    "ppo": ("anchors",),
    "simpo": ("pair means",),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_registered_losses_are_held_to(name: str) -> None:
    """Ratios are held to their anchors, pairs to their difference, and a constant gradient to no level of log-probs."""
    under_test = loss_under_test(registry.build(name))
    assert under_test.invariances == ASKED[name]
    assert check_property(under_test, "shift", EXAMPLES).verdict == ("passed" if ASKED[name] else "not applicable")


def test_probabilities_are_left_alone() -> None:
    """A gate on probabilities is not taken for one on ratios, unless its author says so: then it fails, and is told why."""
    loss, options = SOUND["dppo"]
    assert loss_report(loss, **options, only="shift")["shift"].verdict == "not applicable"
    result = loss_report(loss, **options, only="shift", invariant=["anchors"])["shift"]
    assert result.verdict == "failed"
    assert "log-probs count by themselves" in result.sentence
    assert loss_report(ORPO(), only="shift", invariant=["pair"], examples=EXAMPLES)["shift"].verdict == "failed"


def test_an_epsilon_inside_of_a_log() -> None:
    """Where the gradient does not change with the level of log-probs it may not fade far away: no epsilon, no clamp."""

    def with_epsilon(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -torch.where(mask, torch.log(logprobs.exp() + 1e-8), 0.0).sum()

    def clamped(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -torch.where(mask, logprobs.clamp(min=-20.0), 0.0).sum()

    def focal(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -torch.where(mask, (1 - logprobs.exp()).square() * logprobs, 0.0).sum()

    for loss in (with_epsilon, clamped):
        result = loss_report(loss, form="padded", only="shift", examples=EXAMPLES)["shift"]
        assert result.verdict == "failed"
        assert "an epsilon inside of a log, or a clamp" in result.sentence
    assert loss_report(focal, form="padded", only="shift")["shift"].verdict == "not applicable"


def test_what_is_declared_replaces_what_is_recognised() -> None:
    """Nothing declared turns the property off; an unknown name is refused with those that are known."""
    loss, options = SOUND["trl dpo"]
    assert loss_report(loss, **options, only="shift", invariant=())["shift"].verdict == "not applicable"
    check_loss(loss, **options, only="shift", invariant=("anchors", "pair"), examples=EXAMPLES)
    with pytest.raises(ConfigError, match=r"invariant must be one of.*did you mean 'anchors'"):
        check_loss(loss, **options, invariant=("anchor",))


def turned_around(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss of rewards with its sign turned around."""

    def wrong(
        logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor, group_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        return -loss(logprobs, old_logprobs, rewards, group_ids, completion_mask)

    return wrong


def test_losses_of_rewards_are_checked_in_full() -> None:
    """Rewards are good or bad by the mean of their group: a sign is noticed, and a group without a difference is no alarm."""
    loss, options = SOUND["grpo from rewards"]
    report = check_loss(loss, **options, examples=EXAMPLES)
    assert report["direction"].verdict == report["influence"].verdict == "passed"
    assert report["scale"].verdict == "not applicable"
    failed = loss_report(turned_around(loss), examples=EXAMPLES)["direction"]
    assert failed.verdict == "failed"
    assert "turned around" in failed.sentence


@given(readable_cases(), st.integers(-64, 64).filter(bool))
def test_the_moves_of_rewards(case: Any, sixteenths: int) -> None:
    """A shift of a group moves every reward, and no reward against its group."""
    moved = MOVES["group"](case, sixteenths / 16)
    assert centred(moved) == pytest.approx(centred(case), abs=1e-12)
    before, after = (torch.tensor([s.advantages[0] for s in c.sequences]) for c in (case, moved))
    assert bool((before != after).all())


@given(readable_cases(unit=2), st.integers(-64, -1))
def test_the_moves_of_pairs(case: Any, sixteenths: int) -> None:
    """A shift of a pair moves the sums of its two sides, or their means, by one and the same number."""
    by, case = sixteenths / 16, unweighted(case)
    for move, mean in (("pair sums", False), ("pair means", True)):
        before, after = (_sides(c, mean) for c in (case, MOVES[move](case, by)))
        moved = (after - before).view(-1, 2)
        assert torch.allclose(moved[:, 0], moved[:, 1], atol=1e-12)
        assert bool((moved != 0).all())


def _sides(case: Any, mean: bool) -> Tensor:
    rows = [
        (torch.tensor(s.weights, dtype=torch.float64), torch.tensor(s.logprobs, dtype=torch.float64))
        for s in case.sequences
    ]
    return torch.stack([(w * x).sum() / (w.sum() if mean else 1.0) for w, x in rows])
