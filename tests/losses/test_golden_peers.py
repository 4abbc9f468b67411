"""Our losses give the numbers of the peers' own code on the same log-probs (`tests/golden`; the table is in support)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.case import FP32, Case
from golden.penalties import skyrl_two_means
from golden.table import DIFFERS, ENTRIES, HELD, NOT_YET, PEERS, documented_table, inputs_of
from torch import Tensor

from pullback.losses import GRPO, Loss, TokenBatch
from pullback.losses.functional import reference_point

ROOT = Path(__file__).parents[2]
FIELDS = {"peer", "version", "name", "function", "config", "inputs", "loss", "gradient"}


def batch_inputs(entry: dict[str, Any], case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The log-probs, the mask and what else a batch takes."""
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in inputs_of(entry).items()}
    logprobs, mask = given.pop("logprobs").requires_grad_(), given.pop("mask")
    if case.anchor == "rollout_logprobs":
        del given["old_logprobs"]
    if case.only_kl:
        given["advantages"] = torch.zeros_like(mask)
    if case.groups is not None:
        given["group_id"] = torch.tensor(case.groups)
    if "label" in entry["config"]:
        policy, reference = (torch.tensor(sums, dtype=torch.float64) for sums in entry["config"]["mismatched"])
        given["label"] = torch.tensor(entry["config"]["label"])
        given["reference_point"] = reference_point(policy - reference).expand(4)
    if entry["inputs"] == "pairs":
        rows = torch.arange(mask.shape[0])
        given |= {"pair_id": rows % (len(rows) // 2), "role": (rows < len(rows) // 2).long()}
    return logprobs, mask, given


def answer(loss: Loss, entry: dict[str, Any], case: Case) -> tuple[float, Tensor]:
    """Our loss and its gradient."""
    logprobs, mask, given = batch_inputs(entry, case)
    output = loss.evaluate(TokenBatch.from_padded(logprobs, mask, **given), case.counts)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output.loss.item(), gradient


def errors(loss: Loss, entry: dict[str, Any], case: Case) -> tuple[float, float]:
    """How far value and gradient are from the peer's, relative to the larger of 1 and its own."""
    value, gradient = answer(loss, entry, case)
    expected = torch.tensor(entry["gradient"], dtype=torch.float64)
    distance = float((gradient - expected).norm()) / max(1.0, float(expected.norm()))
    return abs(value - entry["loss"]) / max(1.0, abs(entry["loss"])), distance


@pytest.mark.parametrize("key", HELD)
def test_equal(key: str) -> None:
    """Value and gradient are the peer's, within the table's tolerance."""
    case = HELD[key]
    assert max(errors(case.loss, ENTRIES[key], case)) <= case.tolerance


@pytest.mark.parametrize("key", HELD)
def test_another_loss_is_told_apart(key: str) -> None:
    """The control of each case is far from the peer's gradient."""
    case = HELD[key]
    assert errors(case.control, ENTRIES[key], case)[1] > 1e-3


@pytest.mark.parametrize("key", DIFFERS)
def test_differs(key: str) -> None:
    """What is documented to differ does."""
    case, _ = DIFFERS[key]
    assert max(errors(case.loss, ENTRIES[key], case)) > 1e-3


def test_clamped_estimate_has_no_gradient() -> None:
    """Far from the reference the clamped k3 of peers is silent exactly where ours is loudest."""
    entry = ENTRIES["verl:kl-k3-far"]
    case, _ = DIFFERS["verl:kl-k3-far"]
    given = inputs_of(entry)
    distance = torch.tensor(given["ref_logprobs"]) - torch.tensor(given["logprobs"])
    clamped = (distance.exp() - distance - 1 > 10) & (torch.tensor(given["mask"]) > 0)
    _, ours = answer(case.loss, entry, case)
    theirs = torch.tensor(entry["gradient"], dtype=torch.float64)
    assert bool(clamped.any())
    assert theirs[clamped].abs().max() == 0 < float(ours[clamped].abs().min())
    torch.testing.assert_close(ours[~clamped], theirs[~clamped], rtol=1e-12, atol=1e-14)


def test_straight_through_differs_in_value_only() -> None:
    """verl's k3+ has our reverse-KL gradient everywhere; only what it reports is clamped."""
    case, _ = DIFFERS["verl:kl-k3+-far"]
    value, gradient = errors(case.loss, ENTRIES["verl:kl-k3+-far"], case)
    assert value > 1e-3
    assert gradient <= 1e-12


def test_penalty_with_a_mean_of_its_own_adds_up() -> None:
    """SkyRL's token mean with a KL is our token mean without one and our KL alone as a mean over sequences."""
    entry = ENTRIES["skyrl:ppo_kl-token_mean"]
    _, policy, penalty = skyrl_two_means()
    value, gradient = answer(policy, entry, Case(policy, "", policy))
    kl_value, kl_gradient = answer(penalty, entry, Case(penalty, "", penalty, only_kl=True))
    expected = torch.tensor(entry["gradient"], dtype=torch.float64)
    assert value + kl_value == pytest.approx(entry["loss"], rel=FP32)
    torch.testing.assert_close(gradient + kl_gradient, expected, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("key", [key for key in DIFFERS if "rejection" in key])
def test_rejections_differ_in_the_count_only(key: str) -> None:
    """verl divides by the tokens that are left: times their share, its value and gradient are ours."""
    entry, (case, _) = ENTRIES[key], DIFFERS[key]
    assert isinstance(case.loss, GRPO)
    assert case.loss.correction is not None
    _, mask, given = batch_inputs(entry, case)
    batch = TokenBatch.from_padded(torch.zeros_like(mask), mask, **given)
    kept = case.loss.correction.factor(batch) != 0
    share = float(torch.where(kept, mask, torch.zeros_like(mask)).sum() / mask.sum())
    value, gradient = answer(case.loss, entry, case)
    assert 0 < share < 1
    assert value == pytest.approx(entry["loss"] * share, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(
        gradient, torch.tensor(entry["gradient"], dtype=torch.float64) * share, rtol=1e-12, atol=1e-14
    )


def test_every_entry_has_one_place() -> None:
    """No golden value is left unexamined, and none is in two tables."""
    pending = [key for keys in NOT_YET.values() for key in keys]
    places = Counter([*HELD, *DIFFERS, *pending])
    assert {key: count for key, count in places.items() if count > 1} == {}
    assert set(places) == set(ENTRIES)


def test_entries_are_complete() -> None:
    """Each says what made it, and every gradient is zero where the mask is."""
    for key, entry in ENTRIES.items():
        assert set(entry) >= FIELDS, key
        masked = torch.tensor(inputs_of(entry)["mask"]) == 0
        assert float(torch.tensor(entry["gradient"])[masked].abs().sum()) == 0, key
    for document in PEERS.values():
        assert (ROOT / document["made_by"]).is_file()


def test_documented_table() -> None:
    """docs/losses.md has the table; `PYTHONPATH=.alias:tests/support python tests/support/golden/table.py` prints it."""
    assert documented_table() in (ROOT / "docs" / "losses.md").read_text()
