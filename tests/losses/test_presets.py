"""Presets divide by what the projects divide by whose losses they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from example_losses.loss_inputs import Inputs, make

from pullback.losses import Loss, preset, preset_names

OPTIONS: dict[str, dict[str, Any]] = {"verl:dro": {"dro_beta": 0.1}}
MODES = [
    *((name, OPTIONS.get(name, {})) for name in preset_names()),
    *(
        (f"skyrl:{name}", {"loss_reduction": mode})
        for name in ("regular", "dual_clip", "cispo", "gspo")
        for mode in ("token_mean", "sequence_mean", "prompt_mean")
    ),
    *(("verl:vanilla", {"loss_agg_mode": mode}) for mode in ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean")),
    ("verl:vanilla", {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 9}),
]


def counts_empty_rows(name: str, options: dict[str, Any]) -> bool:
    """Return whether a project divides by all rows: TRL's means of rows, and SkyRL's, which is GSPO's default there."""
    if name in ("trl:grpo", "trl:dr_grpo", "trl:gspo", "trl:luspo"):
        return True
    default = "sequence_mean" if name == "skyrl:gspo" else "token_mean"
    return name.startswith("skyrl") and options.get("loss_reduction", default) == "sequence_mean"


def values(loss: Loss, inputs: Inputs) -> float:
    return loss.evaluate(inputs.batch()).loss.item()


@pytest.mark.parametrize(("name", "options"), MODES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(MODES)])
def test_a_row_without_a_trained_token(name: str, options: dict[str, Any]) -> None:
    """One row more of which nothing is trained: it is one of n + 1 where the project counts rows, and else nothing."""
    loss = preset(name, **options)
    if loss.gradient_kind == "pair":
        pytest.skip("a pair has two responses, both of them trained")
    inputs = make(loss, padded=True, mask="ones", old=True, dtype=torch.float64)
    if "advantages" in inputs.tensors:  # one for each sequence, as the sequence form has it
        inputs = inputs.replaced(advantages=torch.full_like(inputs.tensors["advantages"], 0.75))
    more = inputs.mapped(lambda _, tensor: torch.cat([tensor, tensor[-1:]]))
    more.tensors["weights"][-1] = 0.0
    if "group_id" in more.tensors:
        more.tensors["group_id"][-1] = 99
    share = 0.8 if counts_empty_rows(name, options) else 1.0
    assert values(loss, more) == pytest.approx(values(loss, inputs) * share, rel=1e-12)
