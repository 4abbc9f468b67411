"""The SDKs of Tinker and Fireworks: the update of a step in any number of calls, against a plain formula; and the trap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import distance, make_data, weights_of
from servers import SDK_WARNINGS, served
from torch import Tensor

from pullback.datums import Datum, to_tinker
from pullback.testing.modelcheck.own_forward import own_logprobs

tinker = pytest.importorskip("tinker", reason="the SDK of Tinker is not installed: pip install 'pullback[remote]'")
import tinker_sdk  # noqa: E402

pytestmark = SDK_WARNINGS
KEYS = ("target_tokens", "weights", "advantages", "logprobs")
DATA = [Datum(d.model_input, {k: d.loss_fn_inputs[k] for k in KEYS}) for d in make_data([3, 4, 5, 3, 30, 28, 40, 12])]
# So large that Adam's step is the gradient itself: lr g / (|g| + eps).
LINEAR = {"learning_rate": 1e6, "eps": 1e6, "weight_decay": 0.0}


def plain_grpo(model: Any, data: list[Datum]) -> Tensor:
    """The clipped surrogate over the tokens of the step, written out; each datum is run alone by transformers."""
    total, tokens = torch.zeros(()), 0.0
    for datum in data:
        given = {key: datum.loss_fn_inputs[key].to_torch() for key in KEYS}
        ratio = (own_logprobs(model, datum) - given["logprobs"]).exp()
        gain = torch.minimum(ratio * given["advantages"], ratio.clamp(0.8, 1.2) * given["advantages"])
        total = total - (gain * given["weights"]).sum()
        tokens += float(given["weights"].sum())
    return total / tokens


def gradient(models: Any, client: Any, value: Any) -> dict[str, Tensor]:
    model = served(models, client).model
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    with torch.enable_grad():
        return dict(zip(names, torch.autograd.grad(value(model), parameters), strict=True))


def update(models: Any, client: Any, step: Any) -> dict[str, Tensor]:
    """What a step subtracts from the weights."""
    before = weights_of(served(models, client))
    step()
    after = weights_of(served(models, client))
    return {name: before[name] - after[name] for name in before}


def cut(data: list[Any], calls: int) -> list[list[Any]]:
    size = len(data) // calls
    return [data[i : i + size] for i in range(0, len(data), size)]


@pytest.mark.parametrize("calls", [1, 4])
def test_tinker(service: Any, models: Any, calls: int) -> None:
    """The update is the gradient of the plain formula over the whole step."""
    client = service.create_lora_training_client("tiny", rank=4, train_unembed=False).result()
    exact = gradient(models, client, lambda model: plain_grpo(model, DATA))
    params = tinker.AdamParams(**LINEAR)
    found = update(models, client, lambda: tinker_sdk.train_step(client, cut(to_tinker(DATA), calls), params))
    assert distance(found, exact) < 1e-5


@pytest.mark.parametrize("calls", [1, 4])
def test_fireworks(fireworks: Any, models: Any, calls: int) -> None:
    """The same with Fireworks' SDK, which sends no more than target tokens and weights."""
    import fireworks_training
    from fireworks.training import sdk

    client = fireworks.create_lora_training_client("tiny", rank=4, seed=3, train_unembed=False)
    exact = gradient(models, client, lambda model: plain_grpo(model, DATA))
    params = sdk.AdamParams(**LINEAR)
    found = update(models, client, lambda: fireworks_training.train_step(client, cut(DATA, calls), params))
    assert distance(found, exact) < 1e-5


@pytest.fixture
def client(service: Any) -> Any:
    return service.create_lora_training_client("tiny", rank=4, train_unembed=False).result()


@pytest.mark.parametrize(("data", "factor"), [([DATA[4]] * 4, 4.0), (DATA, None)], ids=["equal", "unequal"])
def test_calls_that_divide_by_their_own_tokens(
    client: Any, models: Any, data: list[Datum], factor: float | None
) -> None:
    """The control: four means are added up. With as many tokens in each call, the gradient is four times as large."""
    exact = gradient(models, client, lambda model: plain_grpo(model, data))

    def naive() -> None:
        for call in cut(to_tinker(data), 4):
            client.forward_backward_custom(call, tinker_sdk.LOSS).result()
        client.optim_step(tinker.AdamParams(**LINEAR)).result()

    found = update(models, client, naive)
    if factor is None:
        assert distance(found, exact) > 1.0
    else:
        assert distance(found, {name: factor * slope for name, slope in exact.items()}) < 1e-5
