"""What the report of check_loss says: imports, reductions, crashes, and names that mean nothing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.errors import ConfigError, MissingExtraError, UnknownLossError
from pullback.losses import GRPO
from pullback.testing import LossCheckError, check_loss, loss_report
from pullback.testing.losscheck import LOSS_PROPERTIES
from pullback.testing.losscheck.search import drawn


def nll(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -torch.where(mask, logprobs, 0.0).sum() / mask.sum().clamp(min=1)


def per_row(logprobs: Tensor, mask: Tensor) -> Tensor:
    return -torch.where(mask, logprobs, 0.0).sum(-1)


def per_pair(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(chosen_logps - rejected_logps)


def crashes(logprobs: Tensor, mask: Tensor, beta: float = 0.1) -> Tensor:
    raise RuntimeError("no such kernel")


def crashes_on_long_rows(logprobs: Tensor, mask: Tensor) -> Tensor:
    if logprobs.shape[1] > 1:
        raise RuntimeError("rows are too long")
    return nll(logprobs, mask)


def test_imports_are_told_once() -> None:
    """A result alone has the imports of its line; a report of several has them once."""

    def multiplied(logprobs: Tensor, mask: Tensor) -> Tensor:
        return (logprobs * mask).sum() / mask.sum()

    report = loss_report(multiplied, form="padded", examples=4, shrink=False)
    assert len(report.failed) > 1
    assert "    first: from pullback.testing import Case, CaseSequence, check_loss\n    again: " in str(
        report["poison"]
    )
    assert str(report).count("import Case, CaseSequence") == 1
    assert "first: " not in str(loss_report(nll, form="padded", only="poison", examples=2)["poison"])


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        (per_row, {"form": "padded"}, "per_row (padded; returns [B]: its mean was checked)"),
        (per_pair, {"form": "trl"}, "per_pair (trl; returns [P]: its mean was checked)"),
        (lambda logprobs, mask: nll(logprobs, mask)[None], {"form": "padded"}, "returns [1]: its mean was checked)"),
        (nll, {"form": "padded"}, "nll (padded)"),
        (GRPO(), {}, "grpo (registered)"),
    ],
    ids=["rows", "pairs", "one", "number", "registered"],
)
def test_means_are_told(loss: Any, options: dict[str, Any], words: str) -> None:
    """The report of a loss with a number for each row says that their mean was checked; that of a number says nothing."""
    report = loss_report(loss, only=["few", "differences"], examples=3, **options)
    assert words in str(report).splitlines()[0]
    assert report.as_json()["note"] == report.note
    assert ("mean was checked" in str(report)) == bool(report.note)


def test_a_loss_that_crashes_is_told_so_once() -> None:
    """One result in the place of all says what was raised and where; a loss that runs on some batch is checked as before."""
    with pytest.raises(LossCheckError) as caught:
        check_loss(crashes, examples=3)
    (result,) = caught.value.report.results
    line = crashes.__code__.co_firstlineno + 1
    told = (
        f"crashes raises on every batch, so nothing could be checked: RuntimeError: no such kernel ({__file__}:{line})"
    )
    assert result.sentence.startswith(told)
    assert "It was given logprobs [4, 3], mask [4, 3]" in result.sentence
    assert str(caught.value).count("no such kernel") == 1
    assert "again" not in str(caught.value)
    assert "Likely cause" not in str(caught.value)
    assert loss_report(crashes, examples=3)["poison"] is not None
    assert {r.property for r in loss_report(crashes_on_long_rows, examples=3, shrink=False).results} == set(
        LOSS_PROPERTIES
    )


def test_what_is_no_loss_is_told_once() -> None:
    """So is a function that returns no number on any batch."""

    def nothing(logprobs: Tensor, mask: Tensor) -> None:
        return None

    (result,) = loss_report(nothing, form="padded", examples=3).results
    assert result.sentence == (
        "nothing returned NoneType in the place of the loss on every batch, so nothing could be checked. Likely cause: it "
        "must be a tensor."
    )


def test_arguments_that_nobody_takes() -> None:
    """A value for an argument that a loss does not have is refused, with what it has."""
    with pytest.raises(
        ConfigError,
        match=r"'beat', which crashes does not take \(did you mean 'beta'\?\); it takes logprobs, mask, beta",
    ):
        check_loss(crashes, arguments={"beat": 0.2})
    with pytest.raises(ConfigError, match="a Loss is given its hyperparameters when it is made"):
        check_loss(GRPO(), arguments={"kl_beta": 0.2})

    def of_anything(logprobs: Tensor, mask: Tensor, **more: Any) -> Tensor:
        assert more == {"beat": 0.2}
        return nll(logprobs, mask)

    def of_datums(data: Any, logprobs: Any, scale: float = 0.0) -> Any:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
        parts = [torch.where(w != 0, w * x, 0.0).sum() for w, x in zip(weights, logprobs, strict=True)]
        return -scale * torch.stack(parts).sum(), {}

    assert not loss_report(of_anything, form="padded", arguments={"beat": 0.2}, only="few", examples=2).failed
    assert not loss_report(of_datums, arguments={"scale": 2.0}, only="influence", examples=2).failed
    assert loss_report(of_datums, only="influence", examples=2).failed


def test_names_of_losses() -> None:
    """A registered loss may be given by its name; a name of nothing is refused with a close one."""
    report = loss_report("grpo", only="few", examples=2)
    assert str(report) == str(loss_report(GRPO(), only="few", examples=2))
    with pytest.raises(UnknownLossError, match="did you mean 'grpo'"):
        check_loss("gpro")


def test_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where random batches cannot be drawn, the error says what for, and what to install."""
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    drawn.cache_clear()
    with pytest.raises(
        MissingExtraError, match=r"^check_loss draws random batches, .*'hypothesis'.*'pullback\[test\]'$"
    ):
        check_loss(nll, form="padded")
