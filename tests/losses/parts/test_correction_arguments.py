"""What a correction is built from and refuses, and what it makes of the loss that has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pullback.errors import ConfigError, DatumError, MissingFieldError
from pullback.losses import CISPO, GRPO, PPO, Correction, Rejection, TokenBatch, TokenStream, get_loss
from pullback.losses.registry import config_of

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "nothing at all": (lambda: Correction("none"), "does nothing"),
    "bounds without a weight": (lambda: Correction("none", high=3.0, reject=Rejection(high=2.0)), "no effect"),
    "normalised without a weight": (
        lambda: Correction("none", reject=Rejection(high=2.0), normalize="tokens"),
        "effect",
    ),
    "range without 1": (lambda: Correction.masked(1.1, 2.0), "contain 1"),
    "truncated below 1": (lambda: Correction.tis(0.5), "contain 1"),
    "mask of everything": (lambda: Correction.masked(0.0, math.inf), "masks nothing"),
    "population of tokens' weights": (lambda: Correction.tis(normalize="sequences"), "mean over sequences"),
    "truncation that cannot bind": (
        lambda: Correction.tis(2.0, level="sequence", reject=Rejection("ratio", "sum", 0.5, 2.0)),
        r"masked\(0.5, 2, level='sequence'\)",
    ),
    "filter of everything": (lambda: Rejection(), "keeps everything"),
    "filter that drops agreement": (lambda: Rejection("ratio", "mean", 1.1, 2.0), "agree"),
    "divergence from below": (lambda: Rejection("k3", "mean", 0.1, 2.0), "agree"),
    "statistic misspelt": (lambda: Rejection("k1"), "statistic"),  # type: ignore[arg-type]
    "reject as text": (lambda: Correction.tis(reject="k3"), "Rejection"),  # type: ignore[arg-type]
    "level misspelt": (lambda: Correction.tis(level="product"), "level"),  # type: ignore[arg-type]
    "high NaN": (lambda: Correction.tis(math.nan), "high"),
    "high as text": (lambda: Correction.tis("2"), "high"),  # type: ignore[arg-type]
    "correction of PPO as text": (lambda: PPO(correction="tis"), "must be a Correction"),  # type: ignore[arg-type]
    "correction of GRPO as a bound": (lambda: GRPO(correction=2.0), "must be a Correction"),  # type: ignore[arg-type]
    "correction of CISPO as a switch": (lambda: CISPO(correction=True), "must be a Correction"),  # type: ignore[arg-type]
    "dual clip of 1": (lambda: PPO(dual_clip=1.0), "dual_clip"),
    "dual clip inside the range": (lambda: PPO(0.5, dual_clip=1.4), "above the clip range"),
    "dual clip without a range": (lambda: GRPO(clip=None, dual_clip=3.0), "without clip"),
    "keys without the weight": (lambda: get_loss("ppo", {"correction_high": 3.0}), "no effect without"),
    "range of cispo as a number": (lambda: CISPO(5.0), "bound at some trainers"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("act", "message"), REFUSED.values(), ids=REFUSED)
def test_meaningless_combinations(act: Callable[[], object], message: str) -> None:
    """What has no meaning is refused where it is written, with the reason."""
    with pytest.raises(ConfigError, match=message):
        act()


def test_keys() -> None:
    """The keys of a configuration build a correction, and one that they describe is written as them."""
    config = {
        "correction_weight": "mask",
        "correction_level": "sequence",
        "correction_low": 0.5,
        "correction_high": 5.0,
    }
    for name in ("ppo", "grpo", "cispo"):
        loss = get_loss(name, config)
        assert loss.correction == Correction.masked(0.5, 5.0, level="sequence")  # type: ignore[attr-defined]
        assert config_of(loss) == config
        assert get_loss(name, {"correction_weight": "truncate"}).correction == Correction.tis()  # type: ignore[attr-defined]
    assert config_of(PPO(dual_clip=3.0)) == {"dual_clip": 3.0}
    assert config_of(PPO(correction=Correction.geometric())) is None
    assert PPO(correction=Correction.icepop()) == PPO(correction=Correction.masked(0.5, 5.0))


@pytest.mark.parametrize(
    ("correction", "kind"),
    [
        (None, "token"),
        (Correction.tis(), "token"),
        (Correction.icepop(), "token"),
        (Correction.rejection(Rejection("k2", "token", high=0.1)), "token"),
        (Correction.tis(level="sequence"), "sequence"),
        (Correction.tis(level="geometric"), "sequence"),
        (Correction.geometric(), "sequence"),
        (Correction.tis(reject=Rejection("ratio", "worst", high=9.0)), "sequence"),
        (Correction.tis(normalize="tokens"), "batch"),
    ],
)
def test_gradient_kind(correction: Correction | None, kind: str) -> None:
    """What a weight depends on is what the loss says, so that nothing is computed from a part of it."""
    for loss in (PPO(correction=correction), GRPO(correction=correction), CISPO(correction=correction)):
        assert loss.gradient_kind == kind
        assert ("old_logprobs" in loss.required_inputs) is (correction is not None)
    zeros = torch.zeros(2)
    batch = TokenBatch.from_packed(zeros, [2], advantages=zeros, old_logprobs=zeros, rollout_logprobs=zeros)
    if kind == "token":
        TokenStream(PPO(correction=correction), batch)
    else:
        with pytest.raises(ConfigError, match="depends on other tokens"):
            TokenStream(PPO(correction=correction), batch)


def test_what_the_data_lack() -> None:
    """Without the anchor of its own there is no correction; log-probs that are not finite are said, not masked."""
    ones = torch.ones(2)
    given_ = {"advantages": ones, "rollout_logprobs": -ones}
    loss = PPO(correction=Correction.icepop())
    with pytest.raises(MissingFieldError, match=r"old_logprobs.*count it twice"):
        loss.evaluate(TokenBatch.from_packed(-ones, [2], **given_))
    for broken in (math.nan, math.inf, -math.inf):
        for name in ("old_logprobs", "rollout_logprobs"):
            inputs = {**given_, "old_logprobs": -ones, name: torch.tensor([-1.0, broken])}
            with pytest.raises(DatumError, match="not finite"):
                loss.evaluate(TokenBatch.from_packed(-ones, [2], **inputs))
    with pytest.raises(ConfigError, match="candidates"):
        Correction.geometric().factor(
            TokenBatch.from_packed(-torch.ones(2, 3), [2], old_logprobs=-torch.ones(2, 3), rollout_logprobs=-torch.ones(2, 3))
        )  # fmt: skip


def test_filters_alone_are_kept_as_they_are_given() -> None:
    """One filter is that filter, several are a tuple, and none is no correction at all."""
    one, other = Rejection("ratio", "mean", high=2.0), Rejection("k3", "token", high=1.0)
    assert Correction.rejection(one) == Correction("none", reject=one)
    assert Correction.rejection(one, other).reject == (one, other)
    with pytest.raises(ConfigError):
        Correction.rejection()


@pytest.mark.parametrize(
    ("level", "reject", "refused"),
    [
        ("token", Rejection("ratio", "token", 0.6, 2.0), True),
        ("token", Rejection("ratio", "token", 0.5, 5.0), True),
        ("sequence", Rejection("ratio", "sum", 0.5, 2.0), True),
        ("geometric", Rejection("ratio", "mean", 0.5, 2.0), True),
        ("token", Rejection("ratio", "token", 0.4, 2.0), False),
        ("token", Rejection("ratio", "token", 0.6, 6.0), False),
        ("token", Rejection("ratio", "mean", 0.6, 2.0), False),
        ("token", Rejection("ratio", "worst", 0.6, 2.0), False),
        ("geometric", Rejection("ratio", "sum", 0.6, 2.0), False),
        ("sequence", Rejection("ratio", "mean", 0.6, 2.0), False),
        ("token", Rejection("k3", "token", high=1.0), False),
    ],
)
def test_bounds_that_can_never_matter(level: Any, reject: Rejection, refused: bool) -> None:
    """A filter by the same ratio that drops all that the weight would bound; another ratio or a wider range is fine."""
    if refused:
        with pytest.raises(ConfigError, match="can never matter"):
            Correction("truncate", level, 0.5, 5.0, reject)
    else:
        assert Correction("truncate", level, 0.5, 5.0, reject).rejections == (reject,)


@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_a_sequence_of_which_nothing_is_trained_has_no_part_in_the_mean(level: Any) -> None:
    """Weights that are divided by their mean over the sequences are the same with and without it."""
    old = torch.tensor([-1.0, -2.0, -1.5], dtype=torch.float64)
    rollout = torch.tensor([-1.2, -1.9, math.nan], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    correction = Correction.tis(level=level, normalize="sequences")
    known = {"weights": weights, "old_logprobs": old, "rollout_logprobs": rollout}
    batch = TokenBatch.from_packed(old, [1, 1, 1], **known)
    alone = TokenBatch.from_packed(old[:2], [1, 1], **{name: tensor[:2] for name, tensor in known.items()})
    assert torch.equal(correction.factor(batch)[:2], correction.factor(alone))


def test_both_ends_of_a_filter_are_kept() -> None:
    """A statistic on its bound is inside, the next one is not; what both policies agree on may be the bound itself."""
    old = torch.tensor([0.0, 1.0, math.nextafter(1.0, 2.0) + 1e-9], dtype=torch.float64)
    batch = TokenBatch.from_packed(old, [3], old_logprobs=old, rollout_logprobs=torch.zeros_like(old))
    assert Correction.rejection(Rejection("k2", "token", high=0.5)).factor(batch).tolist() == [1.0, 1.0, 0.0]
    assert Correction.rejection(Rejection("ratio", "token", 0.5, 1.0)).factor(batch).tolist() == [1.0, 0.0, 0.0]
    assert Correction.rejection(Rejection("ratio", "token", 1.0, 2.0)).factor(batch).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("make", [PPO, CISPO, GRPO])
def test_inputs_are_required_or_optional(make: Any) -> None:
    """The anchor may be given, or must be where a correction needs it, or has no use where there is no ratio."""
    plain, corrected = make(), make(correction=Correction.tis())
    assert "old_logprobs" in plain.optional_inputs
    assert "old_logprobs" in corrected.required_inputs
    for loss in (plain, corrected, GRPO(None, anchor="none")):
        assert not set(loss.required_inputs) & set(loss.optional_inputs)
        assert "group_id" in loss.optional_inputs
    assert "old_logprobs" not in GRPO(None, anchor="none").optional_inputs
