"""What check_loss says: causes that fit, lines that run, and no alarm where the literature has a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_losses.more_sound_losses import kto, leave_one_out, partly_single, reward_weighted, slic
from hypothesis import given
from torch import Tensor

from pullback.cli import main
from pullback.losses import GRPO, KL, PPO, Loss, loss_names, preset, preset_names, registry
from pullback.testing import Case, CaseSequence, LossCheckError, loss_report
from pullback.testing.losscheck import check_property, loss_under_test, search
from pullback.testing.losscheck.rerun import Rerun, case_code
from pullback.testing.museum import EXHIBITS, Exhibit
from pullback.testing.strategies import cases

LOSSES = [exhibit for exhibit in EXHIBITS if exhibit.kind == "loss"]
SAMPLE = ("mask multiplies", "anchor shifted", "chosen and rejected swapped", "sequence skipped", "wrong kind")
PER_ROW = {"form": "padded", "per_sequence": ["advantages"]}


@pytest.fixture(autouse=True)
def _little_shrinking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest example is another test's."""
    monkeypatch.setattr(search, "_SHRINKING", 0)


def clean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, 0.0)


def shown_again(exhibit: Exhibit) -> None:
    """Run the setup and the line of a failure in an empty namespace, and see the same property fail."""
    result = check_property(loss_under_test(exhibit.broken, **exhibit.options), exhibit.found_by, 4)
    assert "Likely cause: " in result.sentence
    assert "sequence 0 token 0:  weight " in result.example
    names: dict[str, Any] = {} if hasattr(exhibit.broken, "__name__") else {"loss": exhibit.broken}
    names |= {"_of_cispo": exhibit.options["expected"]} if "expected" in exhibit.options else {}
    exec(loss_under_test(exhibit.broken, **exhibit.options).rerun.setup, names)
    with pytest.raises(LossCheckError, match=rf"\n{exhibit.found_by}: failed"):
        exec(result.rerun, names)


@pytest.mark.parametrize("exhibit", [e for e in LOSSES if e.name in SAMPLE], ids=lambda e: e.name)
def test_lines_run(exhibit: Exhibit) -> None:
    """The line under a failure shows that failure again, with nothing but the imports that are printed."""
    shown_again(exhibit)


@pytest.mark.soak
@pytest.mark.parametrize("exhibit", LOSSES, ids=lambda e: e.name)
def test_every_line_runs(exhibit: Exhibit) -> None:
    """So it does for every loss of the museum."""
    shown_again(exhibit)


def test_a_line_of_a_registered_loss() -> None:
    """A loss of our own is written as the call that makes it, without what is default."""
    loss = GRPO(kl=KL("k1", gradient="pathwise", acknowledge_biased=True))
    report = loss_report(loss, only="information")
    names: dict[str, Any] = {}
    exec(report.setup, names)
    with pytest.raises(LossCheckError, match="information"):
        exec(report["information"].rerun, names)
    for name in loss_names():
        made = registry.build(name)
        assert eval(Rerun.of(made, {}).loss, names) == made
        assert Rerun.of(type(made)(), {}).line("few", None) == f"check_loss({type(made).__name__}(), only='few')"
    for name in preset_names():
        options: dict[str, Any] = {"dro_beta": 0.1} if name == "verl:dro" else {}
        one: Loss = preset(name, **options)
        assert eval(Rerun.of(one, {}).loss, names) == one


@given(cases())
def test_cases_as_code(case: Case) -> None:
    """A case that is printed is the case again, with what is not finite too."""
    again = eval(case_code(case), {"Case": Case, "CaseSequence": CaseSequence})
    assert repr(again) == repr(case)


def test_the_command_prints_lines_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    """What the command prints after `again` runs as it is printed, after the imports that it names."""
    place = "pullback.testing.museum.tokens:_multiplied"
    assert main(["check", "loss", place, "--form", "padded", "--only", "poison", "--fast"]) == 1
    printed = capsys.readouterr().out.splitlines()
    setup, again = (next(x for x in printed if mark in x) for mark in ("before a line", "again: check_loss"))
    with pytest.raises(LossCheckError, match="poison"):
        exec(f"{setup.split(': ', 1)[1]}\n{again.split(': ', 1)[1]}", {})


def verdict(loss: Any, name: str, **options: Any) -> tuple[str, str]:
    result = check_property(loss_under_test(loss, **options), name, 4)
    return result.verdict, result.sentence


def test_exponentials_and_baselines() -> None:
    """A weight that is an exponential, or a baseline, is no wrong sign; a modulus, a wrong sign, a square and a bound are."""

    def modulus(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -(clean(advantages, mask).abs() * clean(logprobs, mask)).sum()

    def squared(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -(clean(advantages, mask) ** 3 * clean(logprobs, mask)).sum()

    def bounded(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -(clean(advantages, mask).clamp(-1.5, 1.5) * clean(logprobs, mask)).sum()

    def turned(logprobs: Tensor, advantages: Tensor, group_id: Tensor, mask: Tensor) -> Tensor:
        return -leave_one_out(logprobs, advantages, group_id, mask)

    assert verdict(reward_weighted, "direction") == (
        "passed",
        "by how the gradient changes with the advantage: a baseline, or an exponential of it, decides the sign",
    )
    assert verdict(leave_one_out, "direction", **PER_ROW)[0] == "passed"
    assert verdict(modulus, "direction")[0] == verdict(turned, "direction", **PER_ROW)[0] == "failed"
    assert "exponential" in verdict(reward_weighted, "scale")[1]
    assert verdict(squared, "scale")[0] == verdict(bounded, "scale")[0] == "failed"


def test_hinges_and_groups() -> None:
    """A satisfied pair and a group of one have no gradient for a reason; a hinge that never bites, and a slice, have none."""

    def never(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
        return torch.relu(-1e6 - (chosen_logps - rejected_logps)).mean()

    def sliced(logprobs: Tensor, advantages: Tensor, group_id: Tensor, mask: Tensor) -> Tensor:
        return leave_one_out(logprobs, advantages, group_id, mask.bool() & (mask.cumsum(-1) > 1))

    def ignored(logprobs: Tensor, advantages: Tensor, group_id: Tensor, mask: Tensor) -> Tensor:
        return leave_one_out(logprobs, torch.zeros_like(advantages), group_id, mask)

    assert verdict(slic, "influence", form="trl")[0] == verdict(leave_one_out, "influence", **PER_ROW)[0] == "passed"
    assert verdict(never, "influence", form="trl")[0] == verdict(sliced, "influence", **PER_ROW)[0] == "failed"
    assert verdict(leave_one_out, "information", **PER_ROW)[0] == "passed"
    assert verdict(ignored, "information", **PER_ROW)[0] == "failed"


def test_labels_go_with_their_sequences() -> None:
    """A loss of labelled sequences depends on no order, and its direction is known; labels by position are found."""

    def by_position(data: Any, logprobs: Any) -> Any:
        signs = [1.0 if i % 2 == 0 else -1.0 for i in range(len(data))]
        masks = [datum.loss_fn_inputs["weights"].to_torch() != 0 for datum in data]
        rows = zip(signs, masks, logprobs, strict=True)
        return torch.stack([-s * torch.where(m, x, 0.0).sum() for s, m, x in rows]).sum(), {}

    def upside_down(data: Any, logprobs: Any) -> Any:
        loss, metrics = kto(data, logprobs)
        return -loss, metrics

    assert verdict(kto, "permutation")[0] == verdict(kto, "direction")[0] == "passed"
    assert verdict(by_position, "permutation")[0] == verdict(upside_down, "direction")[0] == "failed"


def test_half_precision_inside() -> None:
    """Rounding to bf16 within is found, whatever dtype goes in; fp32 is enough; a surrogate of value 1 is not asked."""

    def half(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -clean(logprobs.bfloat16(), mask).double().sum()

    def single(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -clean(logprobs.float(), mask).sum()

    def surrogate(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        x = clean(logprobs, mask)
        return -(clean(advantages, mask) * torch.exp(x - x.detach())).sum()

    assert verdict(half, "resolution", form="padded")[0] == "failed"
    assert verdict(single, "resolution", form="padded")[0] == verdict(PPO(), "resolution")[0] == "passed"
    assert verdict(surrogate, "resolution")[0] == "not applicable"


@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_differences_of_what_is_partly_single(factor: float) -> None:
    """Rounding of a part that is computed in fp32 is no wrong gradient; beside it a factor in the backward is."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return factor * gradients[0]

    def backward(logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        scaled: Tensor = Scaled.apply(logprobs)  # type: ignore[no-untyped-call]
        return partly_single(scaled, ref_logprobs, advantages, mask)

    assert verdict(backward, "differences")[0] == ("passed" if factor == 1.0 else "failed")


def test_a_loss_without_a_gradient_is_told_once() -> None:
    """Not once for each property."""

    def detached(logprobs: Tensor, mask: Tensor) -> Tensor:
        return -clean(logprobs.detach(), mask).sum()

    (result,) = loss_report(detached, form="padded", examples=3).results
    assert result.sentence.startswith("the loss is not connected to the log-probs on every batch, so nothing could be")
    assert "Likely cause: all of it is detached" in result.sentence


@pytest.mark.parametrize("defect", ["all", "later", "earlier", "one term"])
def test_causes_of_wrong_masks(defect: str) -> None:
    """The cause says whether a mask is missing, shifted, or left out of a term."""

    def loss(logprobs: Tensor, advantages: Tensor, mask: Tensor, attention_mask: Tensor) -> Tensor:
        used = {"all": attention_mask, "later": mask.roll(1, -1), "earlier": mask.roll(-1, -1)}.get(defect, mask)
        extra = 0.1 * logprobs[:, :1].sum() if defect == "one term" else 0.0
        return -(clean(advantages, used) * clean(logprobs, used)).sum() + extra

    expected = {"all": "the whole text", "one term": "every term"}.get(defect, "shifted by one token")
    assert expected in verdict(loss, "untrained")[1]


CAUSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "turned": (lambda x, a: a * x, "direction", "the sign of the loss is turned around"),
    "abs": (lambda x, a: -a.abs() * x, "direction", "the sign of the advantages is lost"),
    "a weight of the policy": (lambda x, a: -a * x.exp() * x, "direction", "is not detached"),
    "only good ones": (lambda x, a: -a.clamp(min=0) * x, "influence", "nothing is learnt from negative advantages"),
    "of no tokens": (lambda x, a: -a.clamp(min=0) * x, "alive", "none at any log-prob"),
    "a clamp": (lambda x, a: -a * x.clamp(min=-5), "alive", "beyond its bound nothing is learnt"),
    "a root": (lambda x, a: -a * x.exp() * x, "alive", "a weight that should be detached is not"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_causes_of_directions_and_silence(name: str) -> None:
    """Which tokens are pushed the wrong way, or not at all, says why."""
    formula, found_by, cause = CAUSES[name]

    def loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return clean(formula(clean(logprobs, mask), clean(advantages, mask)), mask).sum()

    assert verdict(loss, found_by)[0] == "failed"
    assert cause in verdict(loss, found_by)[1]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_one_side_of_a_pair(side: str) -> None:
    def loss(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
        kept = (chosen_logps.detach(), rejected_logps) if side == "chosen" else (chosen_logps, rejected_logps.detach())
        return -torch.nn.functional.logsigmoid(0.1 * (kept[0] - kept[1])).mean()

    assert f"the {side} responses are detached" in verdict(loss, "influence", form="trl")[1]


def test_a_loss_without_a_number_is_told_so() -> None:
    """NaN on a plain batch is named as such, not as a wrong sign, a state or padding; statistics of a batch are named, too."""

    def whitened(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        a = clean(advantages, mask)
        return -((a - a.mean()) / (a.std() + 1e-8) * clean(logprobs, mask)).sum()

    def centred(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        a = clean(advantages, mask)
        return -(clean(a - a.sum() / mask.sum().clamp(min=1), mask) * clean(logprobs, mask)).sum()

    for name in ("direction", "deterministic", "stateless", "layouts", "differences"):
        assert "on a batch of finite numbers the loss is nan" in verdict(whitened, name)[1]
    assert "standard deviation of one number" in verdict(whitened, "few")[1]
    assert verdict(whitened, "information")[0] == "passed"
    assert "over the whole batch" in verdict(centred, "alignment")[1]
