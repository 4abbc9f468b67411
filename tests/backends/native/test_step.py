"""The optimizer step: AdamW to the bit, one normalisation, failed and empty accumulations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import distance, make_data, nll, tiny_backend, weights_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pullback.backends import AdamParams, TorchBackend
from pullback.errors import (
    ConfigError,
    DoubleNormalizationError,
    EmptyUnitError,
    MixedDenominatorsError,
    NonFiniteError,
    PrecedingOperationFailed,
    UnretrievedFailureError,
)
from pullback.losses import DPO, GRPO, KL, ORPO, CrossEntropy, preset
from pullback.testing import TinyLM, example_datums

DATA = make_data([4, 6, 3, 5])


@given(
    lr=st.floats(1e-5, 1e-1),
    decay=st.sampled_from([0.0, 0.1]),
    clip=st.sampled_from([0.0, 0.05]),
    eps=st.sampled_from([1e-12, 1e-8]),
    mode=st.sampled_from([None, "num_loss_tokens", "num_sequences"]),
)
def test_step_is_adamw_to_the_bit(lr: float, decay: float, clip: float, eps: float, mode: Any) -> None:
    """Three fp32 steps, normalised and clipped, equal torch.optim.AdamW bit for bit."""
    model, twin = TinyLM(dtype=torch.float32), TinyLM(dtype=torch.float32)
    backend = TorchBackend(model)
    params = AdamParams(lr, 0.9, 0.95, eps, decay, clip)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=decay)
    for _ in range(3):
        backend.forward_backward(DATA, "cross_entropy").result()
        raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        tokens = sum(int((d.loss_fn_inputs["weights"].to_torch() != 0).sum()) for d in DATA)
        divisor = {None: 1, "num_loss_tokens": tokens, "num_sequences": len(DATA)}[mode]
        for name, p in twin.named_parameters():
            p.grad = raw[name] / divisor
        norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
        if clip:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
        output = backend.optim_step(params, mode).result()
        assert output.divided_by == divisor
        assert output.metrics["grad_norm"] == norm.item()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert backend.weights_version == 3


@pytest.mark.slow
def test_half_precision_accumulates_and_steps_in_fp32() -> None:
    """bf16 weights: many micro-batches sum as one does, and a step below their resolution is not lost."""
    data = make_data([6] * 64)
    one, many = (TorchBackend(TinyLM(dtype=torch.bfloat16), layout="single", token_budget=b) for b in (4096, 6))
    exact = TorchBackend(TinyLM(dtype=torch.float32))
    for name, p in exact.model.named_parameters():
        p.data.copy_(one.model.get_parameter(name))
    for backend in (one, many, exact):
        backend.forward_backward(data, "cross_entropy").result()
    assert all(g.dtype == torch.float32 for g in many.gradients().values())
    assert distance(many.gradients(), one.gradients()) < 5e-3
    assert distance(many.gradients(), exact.gradients()) < 3e-2
    params = AdamParams(learning_rate=1e-5)
    before = weights_of(many)
    for _ in range(400):
        many.forward_backward(data[:1], "cross_entropy").result()
        many.optim_step(params).result()
    moved = {k: w.double() - before[k].double() for k, w in weights_of(many).items()}
    assert max(float(m.abs().max()) for m in moved.values()) > 2e-3  # one step alone rounds to nothing


def test_a_sum_that_overflows_is_refused() -> None:
    """Two finite calls whose sum is not finite make no step, and nothing changes."""
    backend = TorchBackend(TinyLM(dtype=torch.float32))
    before = weights_of(backend)

    def huge(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.cat(logprobs).sum() * 1e36, {}

    calls = 0
    while all(bool(torch.isfinite(g).all()) for g in backend.gradients().values()) and calls < 200:
        backend.forward_backward_custom(DATA, huge).result()
        calls += 1
    assert 1 < calls < 200
    with pytest.raises(NonFiniteError, match="the sum of calls"):
        backend.optim_step(AdamParams()).result()
    assert distance(weights_of(backend), before) == 0.0
    backend.discard_gradients()
    backend.forward_backward(DATA, "cross_entropy").result()
    assert backend.optim_step(AdamParams()).result().stepped


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, r"datum 0 \(the gradient of its log-probs is finite, and overflows times the loss's cotangent\)"),
        (2, r"no single datum \(the gradients of their log-probs are finite, and overflow times .* or summed\)"),
    ],
)
def test_overflowing_gradient_names_layer_and_datum(count: int, words: str) -> None:
    """A gradient that overflows in the model is refused before it is accumulated; one datum has no sum to blame."""

    def huge(_: object, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return sum(((3e38 * (x - x.detach())).sum() for x in logprobs), torch.zeros(())), {}

    backend = TorchBackend(TinyLM(dtype=torch.float32))
    with pytest.raises(NonFiniteError, match=rf"gradient of \w+.* is not finite; first caused by {words}; nothing has"):
        backend.forward_backward_custom(DATA[:count], huge).result()
    assert backend.gradients() == {}


def test_registered_loss_skips_untrained_positions() -> None:
    """Positions of weight 0 cost no head, read 0.0, and are marked as not scored."""
    data = [DATA[0].with_inputs(weights=[0.0, 0.0, 0.0, 1.0])]
    backend = tiny_backend()
    output = backend.forward_backward(data, "cross_entropy").result().loss_fn_outputs[0]
    assert output["scored"].data == [0, 0, 0, 1]
    assert output["logprobs"].data[:3] == [0, 0, 0]
    custom = backend.forward_backward_custom(data, nll, positions="trained").result().loss_fn_outputs[0]
    assert custom["scored"].data == [0, 0, 0, 1]
    assert "scored" not in backend.forward_backward_custom(data, nll).result().loss_fn_outputs[0]


def test_double_normalization_is_refused() -> None:
    """A mean loss and a normalising step do not go together; a sum is divided by the cotangents that are not zero."""
    backend = tiny_backend()
    backend.forward_backward(DATA, CrossEntropy("token_mean")).result()
    with pytest.raises(DoubleNormalizationError, match="already a mean"):
        backend.optim_step(AdamParams(), "num_loss_tokens").result()
    assert backend.optim_step(AdamParams(), "auto").result().normalization == "tokens over 1 call"
    silent = [d.with_inputs(advantages=[0.0] * len(d.model_input)) for d in DATA[:1]]
    backend.forward_backward([*DATA[1:], *silent], "importance_sampling").result()
    trained = sum(int(d.loss_fn_inputs["weights"].to_torch().sum()) for d in DATA[1:])
    assert backend.gradients("num_sequences").keys() == backend.gradients("num_loss_tokens").keys()
    assert backend.optim_step(AdamParams(), "num_loss_tokens").result().divided_by == trained


def test_auto() -> None:
    """auto is what the loss declares, and cannot be known of a function."""
    backend = tiny_backend()
    backend.forward_backward(DATA, "ppo").result()
    assert "num_loss_tokens" in backend.optim_step(AdamParams(), "auto").result().normalization
    backend.forward_backward_custom(DATA, nll).result()
    with pytest.raises(ConfigError, match="function"):
        backend.optim_step(AdamParams(), "auto").result()


def test_mixed_denominators_need_counts() -> None:
    """Two denominators in one accumulation raise, until the totals of the step are given."""
    backend = tiny_backend()
    backend.forward_backward(DATA, DPO()).result()
    with pytest.raises(MixedDenominatorsError, match="counts"):
        backend.forward_backward(DATA, CrossEntropy("token_mean")).result()
    with pytest.raises(MixedDenominatorsError, match="tokens"):
        tiny_backend().forward_backward(DATA, ORPO(nll="token_mean")).result()
    backend.discard_gradients()
    tokens = sum(float(d.loss_fn_inputs["weights"].to_torch().sum()) for d in DATA)
    backend.forward_backward(DATA, DPO(), counts={"pairs": 2}).result()
    backend.forward_backward(DATA, CrossEntropy("token_mean"), counts={"tokens": tokens}).result()
    parts = tiny_backend(), tiny_backend()
    parts[0].forward_backward(DATA, DPO()).result()
    parts[1].forward_backward(DATA, CrossEntropy("token_mean")).result()
    first, second = (b.gradients() for b in parts)
    assert distance(backend.gradients(), {k: first[k] + second[k] for k in first}) < 1e-12
    with pytest.raises(DoubleNormalizationError):
        backend.optim_step(AdamParams(), "num_sequences").result()


def test_failed_call_spoils_the_window_until_read() -> None:
    """A step after an unretrieved failure is refused; the gradients before it are untouched."""
    backend, clean = tiny_backend(), tiny_backend()
    for b in (backend, clean):
        b.forward_backward(DATA, "dpo").result()
    failed = backend.forward_backward(DATA[:3], "dpo")
    with pytest.raises(PrecedingOperationFailed, match="partner"):
        backend.optim_step(AdamParams()).result()
    assert failed.exception() is not None
    assert distance(backend.gradients(), clean.gradients()) == 0.0
    assert backend.optim_step(AdamParams()).result().stepped


def test_failure_in_the_middle_adds_nothing() -> None:
    """A function that raises after the forward leaves the accumulation as it was."""

    def broken(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        raise KeyError("mine")

    backend = tiny_backend()
    backend.forward_backward(DATA, "ppo").result()
    before = backend.gradients()
    with pytest.raises(KeyError, match="mine"):
        backend.forward_backward_custom(DATA, broken).result()
    assert distance(backend.gradients(), before) == 0.0


def test_unread_failure_is_raised_by_close() -> None:
    """Whoever forgets .result() learns of it at the end."""
    backend = tiny_backend()
    future = backend.forward_backward(DATA, "nonsense")
    with pytest.raises(UnretrievedFailureError, match="nonsense"):
        backend.close()
    assert future.exception() is not None


def test_empty_window_makes_no_step() -> None:
    """No gradient, no Adam step: momentum and decay do not move the weights either."""
    backend = tiny_backend()
    backend.forward_backward(DATA, "dpo").result()
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    before = weights_of(backend)
    empty = backend.optim_step(AdamParams(learning_rate=1e-2, weight_decay=0.1)).result()
    silent = [d.with_inputs(advantages=[0.0] * len(d.model_input)) for d in DATA]
    backend.forward_backward(silent, "ppo").result()
    none = backend.optim_step(AdamParams(learning_rate=1e-2), "num_loss_tokens").result()
    assert not empty.stepped
    assert not none.stepped
    assert "empty accumulation" in none.normalization
    assert distance(weights_of(backend), before) == 0.0


def test_loss_object_through_the_custom_door_is_deferred() -> None:
    """A registered loss given as a function is still divided once, by the total over calls."""
    backend, whole = tiny_backend(), tiny_backend()
    loss = preset("seed:cross_entropy")
    for half in (DATA[:1], DATA[1:]):
        backend.forward_backward_custom(half, loss).result()
    whole.forward_backward(DATA, loss).result()
    assert distance(backend.gradients(), whole.gradients()) < 1e-12
    assert math.isclose(backend.optim_step(AdamParams()).result().divided_by, 4.0)


def test_two_means_of_one_denominator_need_counts() -> None:
    """Calls of one loss are parts of one mean; two losses are added, and would be halved by their common count."""
    backend, weights = tiny_backend(), GRPO(kl=KL())
    backend.forward_backward(DATA[:2], CrossEntropy("token_mean")).result()
    backend.forward_backward(DATA[2:], CrossEntropy("token_mean")).result()
    with pytest.raises(MixedDenominatorsError, match="two means of one step"):
        backend.forward_backward(DATA, weights).result()
    backend.discard_gradients()
    backend.forward_backward(DATA, DPO(0.1)).result()
    with pytest.raises(MixedDenominatorsError, match=r"beta=0\.2.*beta=0\.1"):
        backend.forward_backward(DATA, DPO(0.2)).result()
    backend.discard_gradients()
    counts = {"tokens": float(sum(len(d.loss_fn_inputs["weights"].data) for d in DATA))}
    for loss in (CrossEntropy("token_mean"), weights):
        backend.forward_backward(DATA, loss, counts=counts).result()
    assert backend.optim_step(AdamParams()).result().stepped


@pytest.mark.parametrize("budget", [4096, 8, 3])
def test_a_weighted_mean_is_checked_by_the_step(budget: int) -> None:
    """Weights of mixed signs: what counts is the sum of the step, whatever the micro-batches; a sum of 0 or less is refused."""
    weights = [[1.0] * 5, [-1.0] * 3, [1.0] * 7, [-0.5] * 4]
    data = [d.with_inputs(weights=w) for d, w in zip(example_datums((5, 3, 7, 4)), weights, strict=True)]
    backend = tiny_backend(token_budget=budget)
    backend.forward_backward(data, CrossEntropy("weighted_mean")).result()
    assert backend.optim_step(AdamParams()).result().normalization == "weight_sum over 1 call"
    backend.forward_backward(data, CrossEntropy("weighted_mean"), counts={"weight_sum": 7.0}).result()
    assert backend.optim_step(AdamParams()).result().stepped
    backend.forward_backward(data[1::2], CrossEntropy("weighted_mean")).result()
    with pytest.raises(EmptyUnitError, match="positive"):
        backend.optim_step(AdamParams()).result()
