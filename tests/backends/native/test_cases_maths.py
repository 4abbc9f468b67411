"""What a micro-batch must not decide: whether a step's weights can be divided by, and what one unit's loss is."""

from __future__ import annotations

import pytest

from pullback import TorchBackend
from pullback.losses import ORPO
from pullback.testing import TinyLM, example_datums

BUDGETS = (4096, 8, 4)


@pytest.mark.parametrize("counts", [None, {"weight_sum": 7.0}])
def test_weights_of_mixed_signs(counts: dict[str, float] | None) -> None:
    """Weights that sum to 7 over the call are accepted whatever the micro-batches are."""
    signs = [[1.0] * 5, [-1.0] * 3, [1.0] * 7, [-0.5] * 4]
    data = [d.with_inputs(weights=w) for d, w in zip(example_datums((5, 3, 7, 4)), signs, strict=True)]
    for budget in (4096, 8, 3):
        backend = TorchBackend(TinyLM(), token_budget=budget)
        config = {"aggregation": "weighted_mean"}
        assert backend.forward_backward(data, "cross_entropy", config, counts=counts).exception() is None


def test_loss_per_unit_does_not_know_micro_batches() -> None:
    """The loss per unit is by the units of the call, with the totals of a step and without, in any micro-batches."""
    data = example_datums((5, 3, 7, 4, 6, 2))

    def metrics(budget: int, loss: object, config: object, counts: object) -> dict[str, float]:
        backend = TorchBackend(TinyLM(), token_budget=budget)
        call = backend.forward_backward(data, loss, config, counts=counts)  # type: ignore[arg-type]
        return {name: x for name, x in call.result().metrics.items() if "per_unit" in name}

    mean = {"aggregation": "token_mean"}
    plain = metrics(4096, "cross_entropy", mean, None)
    orpo = metrics(4096, ORPO(nll="token_mean"), None, {"tokens": 15.0, "pairs": 3.0})
    assert "loss_per_unit:mean" in plain
    for budget in BUDGETS:
        assert metrics(budget, "cross_entropy", mean, None) == pytest.approx(plain)
        assert metrics(budget, "cross_entropy", mean, {"tokens": 42.0}) == pytest.approx(plain)
        found = metrics(budget, ORPO(nll="token_mean"), None, {"tokens": 15.0, "pairs": 3.0})
        assert found == pytest.approx(orpo)
