"""Our losses give TRL's own numbers on the same log-probs (`tests/golden/make_trl.py` makes them)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.losses import Loss, TokenBatch, preset

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl.json").read_text())


def answer(loss: Loss, case: dict[str, Any], **inputs: Tensor) -> tuple[float, Tensor]:
    """The loss and its gradient on a case's padded log-probs."""
    leaf = torch.tensor(case["logprobs"], dtype=torch.float64).requires_grad_()
    output = loss.evaluate(TokenBatch.from_padded(leaf, torch.tensor(case["mask"]), **inputs))
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output.loss.item(), gradient


def agrees(loss: Loss, case: dict[str, Any], tolerance: float, **inputs: Tensor) -> bool:
    """True if value and gradient are TRL's."""
    value, gradient = answer(loss, case, **inputs)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    same_value = abs(value - case["loss"]) <= tolerance * max(1.0, abs(case["loss"]))
    return same_value and bool((gradient - expected).norm() <= tolerance * max(1.0, float(expected.norm())))


def grpo_inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    named = {"advantages": "advantages", "rollout_logprobs": "old", "ref_logprobs": "ref"}
    return {ours: torch.tensor(case[theirs], dtype=torch.float64) for ours, theirs in named.items()}


def pair_inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    """TRL's rows are all chosen, then all rejected."""
    rows = len(case["logprobs"]) // 2
    index = torch.arange(2 * rows)
    return {"pair_id": index % rows, "role": (index < rows).long()}


def grpo_preset(case: dict[str, Any], **changes: Any) -> Loss:
    options = {
        "beta": case["beta"],
        "epsilon_high": case["epsilon_high"],
        "use_bias_correction_kl": case["correction"],
        **changes,
    }
    if case["loss_type"] == "dr_grpo":
        options["max_completion_length"] = 6
    return preset(f"trl:{case['loss_type']}", **options)


@pytest.mark.parametrize(
    "case", GOLDEN["grpo"], ids=lambda c: f"{c['loss_type']}-{c['beta']}-{c['epsilon_high']}-{c['correction']}"
)
def test_grpo(case: dict[str, Any]) -> None:
    """Every loss_type, clip-higher, and the KL with and without its correction, to 1e-12."""
    inputs = grpo_inputs(case)
    assert agrees(grpo_preset(case), case, 1e-12, **inputs)
    assert not agrees(grpo_preset(case, epsilon=0.05, epsilon_high=0.05), case, 1e-6, **inputs)
    if case["beta"]:
        assert not agrees(grpo_preset(case, use_bias_correction_kl=not case["correction"]), case, 1e-6, **inputs)


@pytest.mark.parametrize("case", GOLDEN["dpo"], ids=lambda c: str(c["beta"]))
def test_dpo(case: dict[str, Any]) -> None:
    """DPO's sigmoid loss, to 1e-12."""
    inputs = {"ref_logprobs": torch.tensor(case["ref"], dtype=torch.float64), **pair_inputs(case)}
    assert agrees(preset("trl:dpo", beta=case["beta"]), case, 1e-12, **inputs)
    assert not agrees(preset("trl:dpo", beta=2 * case["beta"]), case, 1e-6, **inputs)


@pytest.mark.parametrize("case", GOLDEN["orpo"], ids=lambda c: f"{c['beta']}-{c['loss']:.2f}")
def test_orpo(case: dict[str, Any]) -> None:
    """ORPO on responses, to the fp32 that TRL casts to; the paper's per-sequence NLL is another number."""
    assert agrees(preset("trl:orpo", beta=case["beta"]), case, 1e-6, **pair_inputs(case))
    assert not agrees(preset("trl:orpo", beta=3 * case["beta"]), case, 1e-4, **pair_inputs(case))


def test_provenance() -> None:
    """The numbers say what made them."""
    assert GOLDEN["trl"] == "1.16.0"
    assert (Path(__file__).parents[2] / GOLDEN["made_by"]).name == "make_trl.py"
