"""Off policy: a clip, a ratio and a KL that are turned around are told, and no published form of them is blamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from example_losses.loss_inputs import VARIANTS, ids
from torch import Tensor

from pullback.losses import DRO, GRPO, GSPO, KL, Correction
from pullback.testing import loss_report
from pullback.testing.losscheck.failures import Failed
from pullback.testing.losscheck.forms import loss_under_test
from pullback.testing.losscheck.forms.measured import kind_case
from pullback.testing.losscheck.properties.direction import direction

Function = Callable[..., Tensor]
Formula = Callable[..., Tensor]


def loss_of(formula: Formula) -> Function:
    """Return a loss of padded tensors: the mean over trained tokens of a formula of them."""

    def loss(
        logprobs: Tensor,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        ref_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
    ) -> Tensor:
        given = (logprobs, old_logprobs, rollout_logprobs, ref_logprobs, advantages)
        values = formula(*(torch.where(mask, x, 0.0) for x in given))
        return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)

    return loss


def ppo(gain: Callable[[Tensor, Tensor], Tensor], r: Tensor, a: Tensor) -> Tensor:
    return -gain(r * a, r.clamp(0.8, 1.2) * a)


def k3(x: Tensor, ref: Tensor) -> Tensor:
    return torch.expm1(ref - x) - (ref - x)


def binary_tv(x: Tensor, old: Tensor, a: Tensor) -> Tensor:
    gone = x.exp() - old.exp()
    return torch.where(((a > 0) & (gone > 0.05)) | ((a < 0) & (gone < -0.05)), 0.0, -(x - old).exp() * a)


def band(x: Tensor, old: Tensor, a: Tensor) -> Tensor:
    r = (x - old).exp().detach()
    return torch.where((r > 0.8) & (r < 1.2), -r * a * x, 0.0)


RIGHT: Final[dict[str, Formula]] = {
    "ppo": lambda x, old, q, ref, a: ppo(torch.min, (x - old).exp(), a),
    "ppo, only below": lambda x, old, q, ref, a: -torch.min((x - old).exp() * a, (x - old).exp().clamp(min=0.8) * a),
    "a clamp for both signs, as a band": lambda x, old, q, ref, a: -(x - old).exp().clamp(0.8, 1.2) * a,
    "a band on both sides (IcePop)": lambda x, old, q, ref, a: band(x, q, a),
    "binary TV (DPPO)": lambda x, old, q, ref, a: binary_tv(x, old, a),
    "a soft gate (SAPO)": lambda x, old, q, ref, a: -4 * torch.sigmoid((x - old).exp() - 1) * a,
    "a truncated weight": lambda x, old, q, ref, a: -(old - q).exp().clamp(max=2) * (x - old).exp() * a,
    "a weight of the sequence": lambda x, old, q, ref, a: -(old - q).sum(1, keepdim=True).exp() * (x - old).exp() * a,
    "no ratio, a weight of old": lambda x, old, q, ref, a: -(old - q).exp().clamp(max=2) * a * x,
    "a quadratic (DRO)": lambda x, old, q, ref, a: 0.025 * (x - q).square() - a * x,
    "the ratio turned for one sign (ASPO)": lambda x, old, q, ref, a: (
        -torch.where(a > 0, old - x, x - old).exp().detach() * a * x
    ),
    "k3": lambda x, old, q, ref, a: 0.1 * k3(x, ref) - a * x,
    "k3 as a reward": lambda x, old, q, ref, a: -(a - 0.1 * k3(x, ref)).detach() * x,
    "k1 as a reward": lambda x, old, q, ref, a: -(a - 0.1 * (x - ref)).detach() * x,
    "the ratio is to the reference": lambda x, old, q, ref, a: -(x - ref).exp() * a,
}
WRONG: Final[dict[str, tuple[Formula, str]]] = {
    "max": (lambda x, old, q, ref, a: ppo(torch.max, (x - old).exp(), a), "the max of the two gains"),
    "upside-down, clipped": (lambda x, old, q, ref, a: -ppo(torch.min, (old - x).exp(), a), "upside-down"),
    "one bound for both signs": (lambda x, old, q, ref, a: -(x - old).exp().clamp(max=1.2) * a, "one bound for both"),
    "upside-down weight": (
        lambda x, old, q, ref, a: (q - old).exp().detach() * ppo(torch.min, (x - old).exp(), a),
        "exp(old - rollout)",
    ),
    "upside-down weight of the policy": (lambda x, old, q, ref, a: -(q - x).exp().detach() * a * x, "upside-down"),
    "counted twice": (
        lambda x, old, q, ref, a: (old - q).exp().detach() * ppo(torch.min, (x - q).exp(), a),
        "the mismatch counts twice",
    ),
    "KL subtracted": (lambda x, old, q, ref, a: -0.1 * k3(x, ref) - a * x, "the sign of the KL"),
    "KL added to the advantages": (
        lambda x, old, q, ref, a: -(a + 0.1 * (x - ref)).detach() * x,
        "added to the advantages",
    ),
}


def blamed(loss: Any) -> str:
    """Return what is said of a loss; nothing if all is well."""
    try:
        direction(loss_under_test(loss), kind_case(True))
    except Failed as failure:
        return f"{failure} {failure.cause}"
    return ""


@pytest.mark.parametrize("name", RIGHT)
def test_published_forms(name: str) -> None:
    assert blamed(loss_of(RIGHT[name])) == ""


@pytest.mark.parametrize("name", WRONG)
def test_what_is_turned_around(name: str) -> None:
    """With the cause in words."""
    formula, cause = WRONG[name]
    assert cause in blamed(loss_of(formula))


def test_it_is_part_of_the_check() -> None:
    """The smallest batch is a token, and its line shows it again."""
    result = loss_report(loss_of(WRONG["max"][0]), only="direction", examples=2)["direction"]
    assert result.verdict == "failed"
    assert "PPO takes the min" in result.sentence
    assert result.case is not None
    assert [len(s.logprobs) for s in result.case.sequences] == [1]


def test_a_ratio_that_is_clipped_alone() -> None:
    """Its gradient is that of a band, which is published: it passes, and a note says what PPO does otherwise."""
    notes = {
        name: direction(loss_under_test(loss_of(RIGHT[name])), kind_case(True)) or ""
        for name in ("a clamp for both signs, as a band", "ppo", "a truncated weight")
    }
    assert [name for name, note in notes.items() if "where PPO's min brings them back" in note] == [
        "a clamp for both signs, as a band"
    ]


OURS: Final = [
    *(loss for loss in VARIANTS if "advantages" in loss.required_inputs),
    GRPO(kl=KL("k2"), correction=Correction.icepop()),
    GRPO(correction=Correction.tis(level="sequence", normalize="sequences")),
    GRPO(0.2, dual_clip=1.3),
    GSPO(0.2, "sequence_mean", "sequence"),
    DRO(2.0),
]


@pytest.mark.parametrize("loss", OURS, ids=ids(OURS))
def test_our_own(loss: Any) -> None:
    assert blamed(loss) == ""
