"""One loss by all doors: called on datums, and evaluated on a padded or packed batch, whatever else these hold."""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch
from example_losses.loss_inputs import VARIANTS, ids
from hypothesis import given
from hypothesis import strategies as st

from pullback.errors import DatumError
from pullback.losses import DPO, GRPO, GSPO, KL, KTO, PPO, Correction, Loss, TokenBatch
from pullback.losses.batch.keys import INPUT_KEYS

LENGTHS: Final = (2, 3, 1, 3)
ANCHORED: Final = KL(beta=0.5, importance="anchor", acknowledge_biased=True)
LOSSES: Final = [
    *VARIANTS,
    GRPO(clip=None, anchor="none", kl=ANCHORED),
    GRPO(kl=ANCHORED),
    GRPO(kl=ANCHORED, correction=Correction.tis(1.1)),
    PPO(correction=Correction.icepop(0.9, 1.2)),
    GSPO(0.2, "sequence_mean", "sequence"),
]


class Foreign:
    """A datum of somebody else, of plain lists."""

    def __init__(self, **inputs: Any) -> None:
        self.loss_fn_inputs = inputs


def everything(i: int, length: int) -> dict[str, Any]:
    """Return all inputs that a datum may have."""
    rng = torch.Generator().manual_seed(i)
    near = {name: (-2.0 - torch.rand(length, generator=rng)).tolist() for name in ("logprobs", "old_logprobs")}
    return {
        "target_tokens": [0] * length,
        "weights": [1.0, 0.5, 2.0][:length],
        "advantages": [[0.5, -0.75, 1.0, -1.0][i]] * length,
        **near,
        "ref_logprobs": (-2.0 - torch.rand(length, generator=rng)).tolist(),
        "sequence_ratio_mask": [1.0, 0.0, 1.0][:length],
        "pair_id": [i % 2],
        "role": [i // 2],
        "group_id": [i % 2],
        "label": [i % 2],
        "reference_point": [0.25 * i],
    }


@pytest.mark.parametrize("loss", LOSSES, ids=ids(LOSSES))
def test_whatever_else_is_there(loss: Loss) -> None:
    """A loss reads the same of datums that hold every input as of a batch that does."""
    rows = [everything(i, length) for i, length in enumerate(LENGTHS)]
    leaves = [-2.0 - torch.rand(length, generator=torch.Generator().manual_seed(9 + length)) for length in LENGTHS]
    of_datums, _ = loss([Foreign(**row) for row in rows], leaves)
    names = {key: "rollout_logprobs" if key == "logprobs" else key for key in rows[0] if key != "target_tokens"}
    packed: dict[str, Any] = {name: torch.tensor([x for row in rows for x in row[key]]) for key, name in names.items()}
    batch = TokenBatch.from_packed(torch.cat(leaves), list(LENGTHS), **packed)
    assert loss.evaluate(batch).loss.item() == pytest.approx(of_datums.item(), rel=1e-6)


READERS: Final[dict[str, Loss]] = {
    "pair_id": DPO(),
    "role": DPO(),
    "group_id": PPO(0.2, "group_mean_token_mean"),
    "label": KTO(baseline="zero"),
}


@pytest.mark.parametrize("name", READERS)
@given(part=st.floats(-0.5, 0.5).filter(lambda x: x == 0 or abs(x) > 1e-9), row=st.integers(0, 3))
def test_a_whole_number_is_not_cut_off(name: str, part: float, row: int) -> None:
    """A label of 0.9 is none: it is refused, where a conversion alone would make it 0. 1.0 is 1."""
    loss, leaves = READERS[name], [torch.full((length,), -2.0) for length in LENGTHS]
    rows = [everything(i, length) for i, length in enumerate(LENGTHS)]
    whole = loss([Foreign(**each) for each in rows], leaves)[0]
    rows[row][name] = torch.tensor([rows[row][name][0] + part], dtype=torch.float64)
    if part == 0:
        assert loss([Foreign(**each) for each in rows], leaves)[0].item() == whole.item()
        return
    with pytest.raises(DatumError, match=f"datum {row}: '{name}' holds whole numbers"):
        loss([Foreign(**each) for each in rows], leaves)


def test_every_whole_number_that_a_loss_reads_is_tried() -> None:
    read = {key for loss in LOSSES for key in (*loss.required_inputs, *loss.optional_inputs)}
    assert {key for key in read if INPUT_KEYS[key].dtype == "int64"} == {*READERS}
