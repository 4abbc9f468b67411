"""Record what tinker-cookbook's own loss code answers on the shared inputs.

Run in an environment of its own:  pip install torch==2.13.0 numpy transformers datasets,
                                   then pip install --no-deps tinker-cookbook==0.6.1
then:                              python tests/golden/make_cookbook.py > tests/golden/cookbook.json

Its policy losses run in the service, so there is no code of them. DPO is a function of sums over each response, which its
caller takes as dot products with the weights; so they are taken here, in fp64.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from recording import answer, golden_inputs, stand_in_for, write

stand_in_for("chz", "tinker", "PIL", "blobfile", "termcolor")

from tinker_cookbook.preference.train_dpo import compute_dpo_loss  # noqa: E402

INPUTS = golden_inputs()


def dpo(beta: float) -> dict[str, Any]:
    """DPO's loss; the first half of the rows is chosen."""
    given = INPUTS["pairs"]
    leaf = given["logprobs"].clone().requires_grad_()
    policy = list((leaf * given["mask"]).sum(-1))
    reference = list((given["ref_logprobs"] * given["mask"]).sum(-1))
    loss, _ = compute_dpo_loss(policy[:2], policy[2:], reference[:2], reference[2:], beta)
    return {
        "name": f"dpo-{beta:g}",
        "function": "tinker_cookbook.preference.train_dpo.compute_dpo_loss",
        "config": {"dpo_beta": beta},
        "inputs": "pairs",
        **answer(loss, leaf),
    }


write("cookbook", version("tinker-cookbook"), INPUTS, [dpo(beta) for beta in (0.05, 0.1, 0.5)])
