"""The policy losses of asynchronous trainers: any number of calls gives the same update, on the whole backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import accumulate, cut, distance, make_data, tiny_backend, weights_of
from hypothesis import given
from hypothesis import strategies as st
from tiers import sampled

from pullback.backends import AdamParams
from pullback.datums import Datum
from pullback.losses import CISPO, DRO, GRPO, GSPO, KL, PPO, Correction, Loss, Rejection, SimPO

LENGTHS = [3, 6, 2, 5, 7, 1, 4, 4, 6, 2, 3, 5, 2, 7]
LOSSES: list[Loss] = [
    CISPO(aggregation="token_mean", correction=Correction.icepop()),
    DRO(aggregation="token_mean"),
    GSPO(0.2),
    GSPO(0.2, "sequence_mean", "sequence"),
    PPO(dual_clip=3.0, correction=Correction.tis()),
    GRPO(kl=KL(beta=0.1), correction=Correction.tis(5.0, level="sequence")),
    GRPO(aggregation="group_mean_token_mean", correction=Correction.rejection(Rejection("k3", "mean", high=0.1))),
    SimPO(),
]
PARAMS = AdamParams(learning_rate=1e-2, grad_clip_norm=0.5)


def decoupled() -> list[Datum]:
    """Datums with recomputed log-probs beside the sampler's, and one advantage per sequence."""
    generator, data = torch.Generator().manual_seed(5), []
    for datum in make_data(LENGTHS):
        inputs: dict[str, Any] = dict(datum.loss_fn_inputs)
        sampler, advantages = inputs["logprobs"].to_torch(), inputs["advantages"].to_torch()
        near = (sampler + 0.4 * torch.randn(sampler.shape, generator=generator)).clamp(max=-0.01)
        inputs |= {"old_logprobs": near, "advantages": torch.full_like(advantages, float(advantages[0]))}
        data.append(Datum(datum.model_input, inputs))
    return data


@pytest.mark.parametrize(
    "loss", sampled(LOSSES, LOSSES[::3]), ids=lambda loss: f"{loss.name}-{loss.main_aggregation.name}"
)
@given(
    order=st.permutations(range(7)),
    calls=st.sampled_from([1, 2, 7]),
    budget=st.integers(1, 80),
    layout=st.sampled_from(["packed", "forked", "padded", "single"]),
)
def test_split_invariance(loss: Loss, order: list[int], calls: int, budget: int, layout: Any) -> None:
    """The gradient is the same to 1e-12, and so is the update to 1e-10."""
    data = decoupled()
    one, other = tiny_backend(), tiny_backend(token_budget=budget, layout=layout)
    expected = accumulate(one, loss, [data])
    assert distance(accumulate(other, loss, cut(data, calls, order)), expected) < 1e-12
    assert one.optim_step(PARAMS).result().stepped
    assert other.optim_step(PARAMS).result().stepped
    assert distance(weights_of(other), weights_of(one)) < 1e-10


@pytest.mark.parametrize("population", ["tokens", "sequences"])
@given(budget=st.integers(1, 80), layout=st.sampled_from(["packed", "padded", "single"]))
def test_self_normalised_over_the_call(population: Any, budget: int, layout: Any) -> None:
    """The population is the call: micro-batches change nothing, but calls do (which is why it is declared)."""
    loss, data = PPO(correction=Correction.tis(level="sequence", normalize=population)), decoupled()
    expected = accumulate(tiny_backend(), loss, [data])
    assert distance(accumulate(tiny_backend(token_budget=budget, layout=layout), loss, [data]), expected) < 1e-12
    assert distance(accumulate(tiny_backend(), loss, cut(data, 7, list(range(7)))), expected) > 1e-3


def test_the_correction_matters() -> None:
    """Negative control: these data have weights that change the update, at every level."""
    data = decoupled()
    plain = accumulate(tiny_backend(), PPO(), [data])
    found = [plain]
    for level in ("token", "sequence", "geometric"):
        loss = PPO(correction=Correction.tis(level=level))
        found.append(accumulate(tiny_backend(), loss, [data]))
    for i, one in enumerate(found):
        assert all(distance(one, other) > 1e-3 for other in found[:i])
