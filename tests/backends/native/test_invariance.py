"""Any number of calls, any order, any micro-batch, any layout: the same update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import accumulate, cut, distance, make_data, sharing, tiny_backend, weights_of
from hypothesis import given
from hypothesis import strategies as st
from tiers import sampled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native.execution import batching
from pullback.backends.operations.normalization import Ledger
from pullback.errors import LeakyModelError
from pullback.losses import DPO, GRPO, KL, ORPO, PPO, CrossEntropy, Loss
from pullback.testing import FutureLeakLM, PackingLeakLM, RowLeakLM, TinyLM

LENGTHS = [3, 6, 2, 5, 7, 1, 4, 4, 6, 2, 3, 5, 2, 7]
SURROGATE = PPO()
LOSSES: list[Loss] = [
    CrossEntropy(),
    CrossEntropy("token_mean"),
    GRPO(kl=KL(beta=0.1)),
    GRPO(aggregation="sequence_mean_token_mean"),
    GRPO(aggregation="group_mean_token_mean"),
    DPO(),
    ORPO(),
]


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
    data = make_data(LENGTHS)
    one, other = tiny_backend(), tiny_backend(token_budget=budget, layout=layout)
    expected = accumulate(one, loss, [data])
    found = accumulate(other, loss, cut(data, calls, order))
    assert distance(found, expected) < 1e-12
    params = AdamParams(learning_rate=1e-2, grad_clip_norm=0.5)
    assert one.optim_step(params).result().stepped
    assert other.optim_step(params).result().stepped
    assert distance(weights_of(other), weights_of(one)) < 1e-10


@pytest.mark.parametrize("layout", ["packed", "forked"])
@given(
    groups=st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=4), min_size=1, max_size=4),
    budget=st.integers(1, 120),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_together_as_alone(layout: Any, groups: list[list[int]], budget: int, seed: int, data: Any) -> None:
    """Packed in any order, and forked where prefixes are shared: the log-probs and gradient of each alone, to 1e-12."""
    datums = sharing(groups, seed)
    order = data.draw(st.permutations(range(len(datums))))
    alone, together = tiny_backend(layout="single"), tiny_backend(layout=layout, token_budget=budget)
    expected = alone.forward_backward(datums, "ppo").result().loss_fn_outputs
    found = together.forward_backward([datums[i] for i in order], "ppo").result().loss_fn_outputs
    for i, one in zip(order, found, strict=True):
        assert torch.allclose(one["logprobs"].to_torch(), expected[i]["logprobs"].to_torch(), rtol=0, atol=1e-12)
    assert distance(together.gradients(), alone.gradients()) < 1e-12


def test_forks_save_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout is chosen where something is shared; a fork one token too late is another gradient (negative control)."""
    data = sharing([[20, 24], [16, 17, 30]])
    backend, packed = tiny_backend(), tiny_backend(layout="packed")
    plan = backend.plan("ppo", data)
    assert (plan.layout, plan.tokens) == ("forked", 107 - 19 - 15 - 15)
    assert backend.plan("ppo", make_data(LENGTHS)).layout == "packed"
    with FlopCounterMode(display=False) as whole:
        expected = accumulate(packed, SURROGATE, [data])
    with FlopCounterMode(display=False) as counter:
        assert distance(accumulate(backend, SURROGATE, [data]), expected) < 1e-12
    assert counter.get_total_flops() < 0.65 * whole.get_total_flops()
    forks = batching.forks
    backend.discard_gradients()
    monkeypatch.setattr(batching, "forks", lambda r: [(base, shared and shared + 1) for base, shared in forks(r)])
    assert distance(accumulate(backend, SURROGATE, [data]), expected) > 1e-3
    with pytest.raises(LeakyModelError, match="layout='forked'"):
        tiny_backend(layout="forked")


def test_each_call_dividing_by_its_own_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: dividing every call by its own count makes the update depend on the split."""
    data, loss = make_data(LENGTHS), CrossEntropy("token_mean")
    calls = [data[:4], data[4:]]
    expected = accumulate(tiny_backend(), loss, [data])
    record = Ledger.record
    backend = tiny_backend()

    def divided_already(self: Ledger, **entry: Any) -> None:
        for p in backend.model.parameters():
            if p.grad is not None and not self.entries:
                p.grad.data.div_(entry["count"])  # not counted as a change, which the backend would notice
        record(self, **entry)

    assert distance(accumulate(tiny_backend(), loss, calls), expected) < 1e-12
    monkeypatch.setattr(Ledger, "record", divided_already)
    assert distance(accumulate(backend, loss, calls), expected) > 1e-2


def test_planted_leak_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: packed positions that are rolled by one merge neighbours, and the gradient is another."""
    data, loss = make_data([4, 4, 4, 4]), CrossEntropy()
    expected = accumulate(tiny_backend(layout="single"), loss, [data])
    backend = tiny_backend(layout="packed")
    hidden = TinyLM.hidden_states
    monkeypatch.setattr(TinyLM, "hidden_states", lambda self, t, p: hidden(self, t, p.roll(1, -1)))
    assert distance(accumulate(backend, loss, [data]), expected) > 1e-2


def test_leaky_models_are_detected_at_load() -> None:
    """A model that mixes packed sequences is not packed, one that mixes rows runs alone, a non-causal one is refused."""
    data, loss = make_data(LENGTHS), CrossEntropy("token_mean")
    expected = accumulate(tiny_backend(), loss, [data])

    def unprefixed(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("model."): g for name, g in gradients.items()}

    packing = TorchBackend(PackingLeakLM(TinyLM()))
    plan = packing.plan(loss, data)
    assert plan.layout == "padded"
    assert "packing is off" in plan.reason
    assert distance(unprefixed(accumulate(packing, loss, [data])), expected) < 1e-12
    assert TorchBackend(RowLeakLM(TinyLM())).plan(loss, data).layout == "packed"  # one row has nothing to mix with
    with pytest.raises(LeakyModelError, match="layout='padded'"):
        TorchBackend(RowLeakLM(TinyLM()), layout="padded")
    with pytest.raises(LeakyModelError, match="layout='packed'"):
        TorchBackend(PackingLeakLM(TinyLM()), layout="packed")
    with pytest.raises(LeakyModelError, match="not causal"):
        TorchBackend(FutureLeakLM(TinyLM()))


def test_untrained_positions_have_no_influence() -> None:
    """NaN and nonsense where the weight is 0 change nothing, through the whole model."""
    data = make_data([4, 5, 3, 6])
    junk = []
    for datum in data:
        trained = datum.loss_fn_inputs["weights"].to_torch() != 0
        dirty = {
            key: torch.where(trained, datum.loss_fn_inputs[key].to_torch(), torch.nan)
            for key in ("advantages", "logprobs", "ref_logprobs")
        }
        junk.append(datum.with_inputs(**dirty))
    for loss in LOSSES:
        expected = accumulate(tiny_backend(), loss, [data])
        assert distance(accumulate(tiny_backend(), loss, [junk]), expected) == 0.0


def test_trainable_parts_only() -> None:
    """Frozen parameters get no gradient and are not accumulated."""
    model = TinyLM()
    model.embedding.requires_grad_(False)
    backend = TorchBackend(model)
    found = accumulate(backend, CrossEntropy(), [make_data([3, 4])])
    assert "embedding" not in found
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
