"""A rollout is scored at the temperature that it was drawn at, by policy and reference, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_backend, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.backends import Backend, Engine, FakeBackend, SamplingParams, ScoreRequest, TorchBackend
from pullback.datums import Datum, ModelInput, datum_from_rollout
from pullback.errors import UnsupportedError
from pullback.testing import TinyLM

MAKERS: dict[str, Callable[[], Any]] = {
    "fake": FakeBackend,
    "exact": tiny_backend,
    "llama": lambda: TorchBackend(tiny_llama(torch.float64, lora=4)),
}


def tempered(temperatures: list[float]) -> list[Datum]:
    lengths = [4 + i for i in range(len(temperatures))]
    return [d.with_inputs(temperature=[t]) for d, t in zip(make_data(lengths), temperatures, strict=True)]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_ratio_of_fresh_rollouts_is_one(make: Callable[[], Any]) -> None:
    """On-policy, at any temperature; with the untempered log-probs it would not be."""
    backend = make()
    prompts = [ModelInput.from_ints([1, 2]), ModelInput.from_ints([3])]
    for temperature in (0.3, 1.0, 1.7):
        params = SamplingParams(max_tokens=6, temperature=temperature, seed=0, stop=[])
        rollouts = backend.sample(prompts, 2, params).result()
        data = [
            datum_from_rollout(
                prompts[r.prompt_index].to_ints(), r.tokens, r.sampler_logprobs, 0.5, temperature=temperature,
                logprobs_of="sampler",
            )
            for r in rollouts
        ]  # fmt: skip
        ratio = backend.forward_backward(data, "importance_sampling").result().metrics["ratio_largest:max"]
        assert ratio == pytest.approx(1.0, abs=1e-5)
        if temperature != 1.0:
            assert any(abs(a - b) > 1e-3 for r in rollouts for a, b in zip(r.logprobs, r.sampler_logprobs, strict=True))


@settings(max_examples=10)
@given(temperatures=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4))
def test_log_probs_are_those_of_tempered_logits(temperatures: list[float]) -> None:
    """Mixed in one call, in one or several forwards: as the model's own logits say, divided by each temperature."""
    data = tempered(temperatures)
    for budget in (4096, 8):
        model = TinyLM()
        backend = TorchBackend(model, token_budget=budget)
        outputs = backend.forward(data, "cross_entropy").result().loss_fn_outputs
        for datum, output, temperature in zip(data, outputs, temperatures, strict=True):
            tokens, head = datum.model_input.tokens[None], model.head()
            with torch.no_grad():
                hidden = model.hidden_states(tokens, torch.arange(tokens.numel())[None])[0]
                logits = hidden @ head.weight.T + (0.0 if head.bias is None else head.bias)
            own = (logits / temperature).log_softmax(-1)
            expected = own.gather(-1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, None])[:, 0]
            assert torch.allclose(output["logprobs"].to_torch().double(), expected, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "ppo", "function"])
def test_gradients_are_of_the_tempered_policy(loss: str) -> None:
    """One call on mixed temperatures is the sum of one call for each; without the temperature it is another gradient."""

    def function(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -sum((x.exp().sum() for x in logprobs), torch.zeros(())), {}

    def gradients(calls: list[list[Datum]]) -> dict[str, torch.Tensor]:
        backend = tiny_backend()
        for call in calls:
            (
                backend.forward_backward_custom(call, function)
                if loss == "function"
                else backend.forward_backward(call, loss)
            ).result()
        return backend.gradients()

    data = tempered([0.5, 2.0, 0.5, 1.0])
    whole = gradients([data])
    assert distance(whole, gradients([[d] for d in data])) < 1e-12
    assert distance(whole, gradients([make_data([4, 5, 6, 7])])) > 1e-2


def test_a_backend_that_cannot_refuses() -> None:
    """No datum is scored at another temperature than it says."""

    class Plain(Engine):
        def score(self, call: Any) -> Any:
            return [torch.zeros(r.length) for r in call.requests]

        accumulate = step = clear = save = load = score  # type: ignore[assignment]  # never called

    backend = Backend(Plain())
    assert backend.forward(make_data([4]), "cross_entropy").result()
    with pytest.raises(UnsupportedError, match=r"datums \[1\] were sampled at another temperature"):
        backend.forward(tempered([1.0, 0.5]), "cross_entropy").result()
    assert ScoreRequest.of(tempered([0.5])[0]).temperature == 0.5


def test_cut_distributions_are_counted() -> None:
    """Datums that were drawn with top_p are a metric of every call."""
    data = make_data([4, 5])
    cut = [d.with_inputs(top_p=[0.9]) for d in data[:1]] + data[1:]
    assert tiny_backend().forward(cut).result().metrics["rollouts_cut:sum"] == 1.0
    assert "rollouts_cut:sum" not in tiny_backend().forward(data).result().metrics
