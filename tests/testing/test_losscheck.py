"""check_loss: no false alarm on sound losses in any style, and every planted defect found by its property."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from example_losses.more_sound_losses import MORE_SOUND
from example_losses.one_sided_losses import ONE_SIDED
from example_losses.sound_losses import SOUND
from seed_examples import run
from tiers import TIER, sampled
from torch import Tensor

from pullback.errors import ConfigError
from pullback.losses import (
    DPO,
    GRPO,
    KL,
    ORPO,
    PPO,
    Correction,
    CrossEntropy,
    Loss,
    fixed_length,
    functional,
    loss_names,
    preset,
    preset_names,
    registry,
)
from pullback.losses.evaluation import token_sum
from pullback.losses.functional import closed_form_of
from pullback.testing import Case, CaseSequence, LossCheckError, check_loss, loss_report
from pullback.testing.losscheck import FORMS, LOSS_PROPERTIES, check_property, loss_under_test

EXAMPLES = 5
ALL_SOUND = {**SOUND, **MORE_SOUND, **ONE_SIDED}
PAGE = Path(__file__).parents[2] / "docs" / "checking.md"
LOSSES: list[Loss] = [
    *(registry.build(name) for name in loss_names()),
    CrossEntropy("group_mean_token_mean"),
    CrossEntropy("weighted_mean"),
    CrossEntropy(fixed_length(7)),
    GRPO(kl=KL("k3", 0.5, gradient="pathwise")),
    GRPO(None, KL("k2", gradient="pathwise", importance=False), "none", "sequence_mean_token_mean"),
    DPO(0.5, 0.1),
    ORPO(nll="token_mean"),
    PPO(dual_clip=3.0, correction=Correction.tis(2.0)),
]


@pytest.mark.parametrize(
    "loss", sampled(LOSSES, LOSSES[::3]), ids=[f"{i}-{loss.name}" for i, loss in enumerate(LOSSES)]
)
def test_registered_losses_are_sound(loss: Loss) -> None:
    """No property raises an alarm on a loss of our own, and the gradient is compared with differences in all of them."""
    report = check_loss(loss, examples=EXAMPLES)
    assert {result.property for result in report.results} == set(LOSS_PROPERTIES)
    assert report["differences"].verdict == report["kind"].verdict == report["constants"].verdict == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names())
def test_presets_are_sound(name: str) -> None:
    """Nor does any on the presets, but for the seed's GRPO, whose KL is k1 in the loss."""
    options = {"dro_beta": 0.1} if name == "verl:dro" else {}
    failed = [result.property for result in loss_report(preset(name, **options)).failed]
    assert failed == (["information"] if name == "seed:grpo" else [])


@pytest.mark.parametrize("name", sampled(ALL_SOUND, [*ALL_SOUND][::3]))
def test_sound_losses_of_others(name: str) -> None:
    """No property raises an alarm on a sound loss in another style."""
    loss, options = ALL_SOUND[name]
    check_loss(loss, examples=EXAMPLES if name in SOUND or name in ONE_SIDED or TIER != "quick" else 3, **options)


def test_enough_sound_losses() -> None:
    """There are thirty at least, in every form that the check knows beside our own."""
    forms = {loss_under_test(loss, **options).form for loss, options in ALL_SOUND.values()}
    assert len(ALL_SOUND) == len(SOUND) + len(MORE_SOUND) + len(ONE_SIDED) >= 30
    assert forms == set(FORMS) - {"registered"}


def mangled(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    """Plant a defect in the library itself."""
    match defect:
        case "mask multiplies":
            monkeypatch.setattr(token_sum, "select_", lambda values, weights: values * weights)
        case "closed form with the wrong sign":
            right = closed_form_of(functional.ppo_clip)
            assert right is not None
            monkeypatch.setattr(
                token_sum,
                "closed_form_of",
                lambda d: lambda *a: tuple(s * x for s, x in zip((1, -1), right(*a), strict=True)),
            )
        case "pairs by position":
            monkeypatch.setattr("pullback.losses.TokenBatch.neighbours_are_pairs", True)


@pytest.mark.parametrize(
    ("defect", "loss", "found_by"),
    [
        ("mask multiplies", PPO(), "poison"),
        ("closed form with the wrong sign", PPO(), "differences"),
        ("pairs by position", DPO(), "pairs_by_id"),
    ],
)
def test_defects_in_our_own(defect: str, loss: Loss, found_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks a registered loss is found, too."""
    mangled(monkeypatch, defect)
    assert check_property(loss_under_test(loss), found_by, 8).verdict == "failed"


def test_the_reference_of_k1_carries_no_information() -> None:
    """A GRPO with k1 in the loss is told so in plain words."""
    loss = GRPO(kl=KL("k1", gradient="pathwise", acknowledge_biased=True))
    report = loss_report(loss, examples=EXAMPLES)
    assert [result.property for result in report.failed] == ["information"]
    assert "the loss carries no information about the reference" in report["information"].sentence


def seed_grpo(data: Any, logprobs: Any) -> Any:
    """The published example, which has rewards and reference in its closure."""
    make = run("grpo", compute_advantages=lambda rewards: rewards)["make_grpo_loss"]
    advantages = [datum.loss_fn_inputs["advantages"].data[0] for datum in data]
    return make(advantages, [datum.loss_fn_inputs["ref_logprobs"].data for datum in data])(data, logprobs)


def seed_dpo(data: Any, logprobs: Any) -> Any:
    """The published example, which has the reference in its closure and is made for one pair."""
    reference = [datum.loss_fn_inputs["ref_logprobs"].data for datum in data]
    return run("dpo")["make_dpo_loss"](*reference[:2])(data, logprobs)


def test_the_reference_of_the_published_example_carries_no_information() -> None:
    """The published GRPO, which has k1 in its loss, is told in plain words that its KL knows nothing of the reference."""
    result = loss_report(seed_grpo, per_sequence=["advantages"], only="information")["information"]
    assert result.verdict == "failed"
    assert "the loss carries no information about the reference" in result.sentence
    assert "estimated by k1" in result.sentence


@pytest.mark.slow
def test_published_examples() -> None:
    """One published example is told that its KL tells nothing and its mask multiplies, the other that it takes one pair."""
    report = loss_report(seed_grpo, per_sequence=["advantages"], examples=EXAMPLES)
    assert [result.property for result in report.failed] == ["poison", "information"]
    assert (
        "only the first 2 sequences are read"
        in loss_report(seed_dpo, only="influence", examples=2)["influence"].sentence
    )


def test_a_minimal_example() -> None:
    """A failure names the property, the cause, the smallest batch in tokens and numbers, and the line that runs it again."""

    def backwards(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return (torch.where(mask, advantages, 0.0) * torch.where(mask, logprobs, 0.0)).sum()

    with pytest.raises(LossCheckError, match=r"direction: failed.*sign of the loss") as caught:
        check_loss(backwards, examples=EXAMPLES)
    result = caught.value.report["direction"]
    assert result.case is not None
    assert sum(len(s.logprobs) for s in result.case.sequences) == 1
    assert "sequence 0 token 0:  weight 1  logprob -1  advantage" in result.example
    names: dict[str, Any] = {"check_loss": check_loss, "Case": Case, "CaseSequence": CaseSequence, "math": math}
    with pytest.raises(LossCheckError, match="direction"):
        exec(result.rerun, {**names, "backwards": backwards})
    assert json.loads(json.dumps(caught.value.report.as_json()))["sound"] is False
    assert "1 failed" in str(caught.value.report)


def test_the_first_example() -> None:
    """Without shrinking the same properties fail, on the first batch that was drawn, which is larger."""

    def untrained(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -logprobs.sum()

    first, smallest = (
        loss_report(untrained, form="padded", only="untrained", examples=EXAMPLES, shrink=shrink)["untrained"]
        for shrink in (False, True)
    )
    assert first.verdict == smallest.verdict == "failed"
    sizes = [sum(len(s.logprobs) for s in r.case.sequences) for r in (first, smallest) if r.case is not None]
    assert sizes[0] > sizes[1]


def test_few_and_empty_cases() -> None:
    """One sequence, three sequences and nothing trained are no reason for an alarm; half a pair is not applicable."""

    def one(w: float = 1.0, x: float = -1.0) -> CaseSequence:
        return CaseSequence([x, -2.0], [w, w], [1.0, -1.0], [-1.1, -2.0], [-1.0, -2.0], [-1.0, -1.0])

    check_loss(CrossEntropy("token_mean"), Case((one(),)))
    check_loss(PPO(), Case((one(), one(x=-0.5), one(x=-0.7))))
    check_loss(CrossEntropy(), Case((one(0.0), one(0.0))))
    assert {r.verdict for r in check_loss(DPO(), Case((one(),))).results} <= {"not applicable", "passed"}


def test_what_cannot_be_called() -> None:
    """An argument of an unknown name is refused with what to do; a number in its place serves."""

    def focused(logprobs: Tensor, mask: Tensor, sharpness: float) -> Tensor:
        return -torch.where(mask, logprobs, 0.0).sum() * sharpness

    def pairs(chosen_logps: Tensor, rejected_logps: Tensor, chosen_mask: Tensor) -> Tensor:
        return (rejected_logps - chosen_logps)[chosen_mask].mean()

    with pytest.raises(
        ConfigError, match=r"takes 'sharpness'.*arguments={'sharpness': value}\), or --argument sharpness=value"
    ):
        check_loss(focused)
    with pytest.raises(
        ConfigError, match=r"takes 'chosen_mask'.* rows of one tensor, 2i the chosen answer and 2i .+ 1 the"
    ):
        check_loss(pairs)
    check_loss(focused, arguments={"sharpness": 2.0}, examples=2)
    with pytest.raises(ConfigError, match="form must be one of"):
        check_loss(focused, form="paddded")
    with pytest.raises(ConfigError, match="did you mean 'differences'"):
        check_loss(CrossEntropy(), only="diferences")
    with pytest.raises(ConfigError, match="a Loss or a function"):
        check_loss(3)


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_from_the_page_to_ones_own_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """README leads to the page, which checks a padded loss in five lines, and prints what it finds in another."""
    assert "(docs/checking.md)" in (PAGE.parents[1] / "README.md").read_text()
    own, check, broken, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert check.count("\n") <= 5
    namespace: dict[str, Any] = {}
    exec(own + check + broken, namespace)
    assert [result.property for result in namespace["report"].failed] == ["poison"]
    shown = PAGE.read_text().partition(f"{broken}```\n\n")[2].partition("\n\n")[0]
    expected = "".join(line.removeprefix("    ") + "\n" for line in shown.splitlines())
    assert capsys.readouterr().out.endswith(f"\n{expected}")
    first, again = (line.split(": ", 1)[1] for line in expected.splitlines()[-2:])
    with pytest.raises(LossCheckError, match="poison: failed"):
        exec(f"{first}\n{again}", {"multiplied": namespace["multiplied"]})


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_the_page_lists_every_property() -> None:
    """The table of the page has each property that is checked, and none that is not."""
    table = PAGE.read_text().partition("## The properties\n")[2].partition("\n\nWhat a function detaches")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    listed = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(LOSS_PROPERTIES)
