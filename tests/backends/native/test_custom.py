"""A custom function against the built-in loss of its maths: the same gradient, for the same FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import VOCAB, distance, make_data, nll, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from tiers import sampled
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.flop_counter import FlopCounterMode

from pullback.backends import AdamParams, TorchBackend
from pullback.errors import BackendError
from pullback.testing import TinyLM

DATA = make_data([4, 6, 3, 5])


def policy(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Importance sampling as a user would write it."""
    loss = torch.zeros(())
    for datum, lp in zip(data, logprobs, strict=True):
        w, a, q = (datum.loss_fn_inputs[k].to_torch().to(lp.dtype) for k in ("weights", "advantages", "logprobs"))
        loss = loss - (w * a * torch.exp(lp - q)).sum()
    return loss, {}


def preference(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """DPO as a user would write it, a sum over pairs."""
    h = []
    for datum, lp in zip(data, logprobs, strict=True):
        w, ref = (datum.loss_fn_inputs[k].to_torch().to(lp.dtype) for k in ("weights", "ref_logprobs"))
        h.append(torch.dot(lp - ref, w))
    terms = [-logsigmoid(0.1 * (h[i] - h[i + 1])) for i in range(0, len(h), 2)]
    return torch.stack(terms).sum(), {"pairs": len(terms)}


def grpo(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """GRPO's clipped surrogate as a user would write it, a sum."""
    loss = torch.zeros(())
    for datum, lp in zip(data, logprobs, strict=True):
        a, q = (datum.loss_fn_inputs[k].to_torch().to(lp.dtype) for k in ("advantages", "logprobs"))
        ratio = torch.exp(lp - q)
        loss = loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
    return loss, {}


def odds(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """ORPO as a user would write it, a sum over pairs."""
    mean = [lp.mean() for lp in logprobs]
    ratio = [lp - torch.log1p(-lp.exp()) for lp in mean]
    terms = [-mean[i] - 0.1 * logsigmoid(ratio[i] - ratio[i + 1]) for i in range(0, len(mean), 2)]
    return torch.stack(terms).sum(), {}


TWINS = [
    ("cross_entropy", {}, nll),
    ("importance_sampling", {}, policy),
    ("grpo", {"aggregation": "sum"}, grpo),
    ("dpo", {"aggregation": "sum"}, preference),
    ("orpo", {"aggregation": "sum"}, odds),
]
FEW_TWINS = sampled(TWINS, [twin for twin in TWINS if twin[0] in ("grpo", "orpo")], several=True)


def flops_and_gradient(
    backend: TorchBackend, call: Callable[[TorchBackend], Any]
) -> tuple[int, dict[str, Tensor], Mapping[str, float]]:
    with FlopCounterMode(display=False) as counter:
        output = call(backend)
    return counter.get_total_flops(), backend.gradients(), output.metrics


def frozen_head(**options: Any) -> TorchBackend:
    model = TinyLM()
    model.unembedding.requires_grad_(False)
    return TorchBackend(model, **options)


@pytest.mark.parametrize(("name", "config", "function"), FEW_TWINS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("budget", [9, 4096])
def test_custom_function_costs_and_gives_the_same(
    name: str, config: dict[str, Any], function: Any, budget: int
) -> None:
    """A function with a built-in loss's maths gives its gradient, for exactly its FLOPs (not 1.5 times)."""
    data = [d.with_inputs(weights=[1.0] * len(d.model_input)) for d in DATA]
    built_in, own = frozen_head(token_budget=budget), frozen_head(token_budget=budget)
    flops, expected, _ = flops_and_gradient(built_in, lambda b: b.forward_backward(data, name, config).result())
    flops_own, found, _ = flops_and_gradient(own, lambda b: b.forward_backward_custom(data, function).result())
    if budget == 4096 or built_in.plan(name, data).micro_batches == own.plan(function, data).micro_batches:
        assert flops == flops_own > 0
    assert distance(found, expected) < 1e-12
    twice, _, _ = flops_and_gradient(
        own, lambda b: (b.forward(data).result(), b.forward_backward_custom(data, function).result())[1]
    )
    assert twice > 1.2 * flops_own


@pytest.mark.parametrize(("name", "config", "function"), FEW_TWINS, ids=lambda x: x if isinstance(x, str) else "")
def test_custom_function_on_a_trained_head(name: str, config: dict[str, Any], function: Any) -> None:
    """With a head that is a fifth of the model and trained too: at most 1.11 times the built-in loss."""
    data = [d.with_inputs(weights=[1.0] * len(d.model_input)) for d in make_data([8, 8, 8, 8])]
    built_in, own = (TorchBackend(TinyLM(VOCAB, hidden=16, layers=1, tied=True)) for _ in range(2))
    flops, expected, _ = flops_and_gradient(built_in, lambda b: b.forward_backward(data, name, config).result())
    flops_own, found, _ = flops_and_gradient(own, lambda b: b.forward_backward_custom(data, function).result())
    assert flops <= flops_own <= 1.11 * flops
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize(("name", "config", "function"), FEW_TWINS, ids=lambda x: x if isinstance(x, str) else "")
def test_beyond_the_activation_budget(name: str, config: dict[str, Any], function: Any) -> None:
    """Graphs that do not fit run their trunk again: the same gradient, reported; a registered loss streams at 1.0."""
    data = [d.with_inputs(weights=[1.0] * len(d.model_input)) for d in make_data([8] * 8)]
    whole = frozen_head(token_budget=16)
    flops, expected, metrics = flops_and_gradient(whole, lambda b: b.forward_backward_custom(data, function).result())
    held = metrics["graph_bytes:max"]
    assert metrics["recomputed_tokens:sum"] == 0
    half = frozen_head(token_budget=16, activation_budget=held / 2)
    flops_half, found, reported = flops_and_gradient(half, lambda b: b.forward_backward_custom(data, function).result())
    assert distance(found, expected) < 1e-12
    assert reported["recomputed_tokens:sum"] == 32
    assert reported["graph_bytes:max"] <= held / 2
    assert 1.05 * flops < flops_half <= 1.25 * flops
    _, _, single = flops_and_gradient(
        frozen_head(token_budget=16, activation_budget=0), lambda b: b.forward_backward(data, name, config).result()
    )
    assert single["graph_bytes:max"] <= held / 3
    assert single["recomputed_tokens:sum"] == 0


@pytest.mark.parametrize("model", [TinyLM, lambda: tiny_llama(lora=2)])
def test_a_call_that_trains_nothing(model: Any) -> None:
    """All weights zero: zero gradients by every road, and no step."""
    for backend in (TorchBackend(model()), TorchBackend(model(), activation_budget=0)):
        data = [d.with_inputs(weights=[0.0] * len(d.model_input)) for d in make_data([5, 4])]
        backend.forward_backward(data, "cross_entropy").result()
        backend.forward_backward_custom(data, lambda d, lp: ((lp[0] * 0.0).sum(), {})).result()
        assert not any(bool(g.any()) for g in backend.gradients().values())
        assert not backend.optim_step(AdamParams()).result().stepped


@given(order=st.permutations(range(4)), first=st.sets(st.integers(0, 3)), second=st.sets(st.integers(0, 3)))
def test_held_forwards_serve_any_later_call(order: list[int], first: set[int], second: set[int]) -> None:
    """What was held before, in any parts, gives the gradient of an ordinary call at its FLOPs."""
    data = make_data([5, 7, 3, 6])
    plain, backend = TorchBackend(TinyLM(), layout="single"), TorchBackend(TinyLM(), layout="single")
    with FlopCounterMode(display=False) as whole:
        plain.forward_backward_custom(data, lambda d, lp: (torch.cat(lp).sum(), {})).result()
    plain.discard_gradients()
    expected = plain.forward_backward(data, "ppo").result()
    with FlopCounterMode(display=False) as counter:
        held = {}
        for part in (first, second - first):
            at = [i for i in order if i in part]
            if at:
                held[backend.forward_retain([data[i] for i in at]).result()] = at
        found = backend.backward(held, data, "ppo").result()
    assert distance(backend.gradients(), plain.gradients()) < 1e-12
    assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"])
    assert found.metrics["reused_tokens:sum"] + found.metrics["forward_tokens:sum"] == 21
    assert counter.get_total_flops() == whole.get_total_flops()
    for one in held:
        with pytest.raises(BackendError, match="serves the datums"):
            backend.backward({backend.forward_retain(data[:1]).result(): [1]}, data, "ppo").result()
        with pytest.raises(BackendError, match="has served already"):
            backend.backward({one: held[one]}, data, "ppo").result()


def test_a_held_forward_does_not_outlive_its_weights() -> None:
    """After a step it is refused."""
    backend, data = TorchBackend(TinyLM()), make_data([5, 7])
    held = backend.forward_retain(data).result()
    backend.forward_backward(data, "cross_entropy").result()
    backend.optim_step(AdamParams()).result()
    with pytest.raises(BackendError, match="changed since"):
        backend.backward({held: [0, 1]}, data, "cross_entropy").result()


def test_old_names_of_retained_forwards() -> None:
    """``hold`` and ``pull`` do what ``forward_retain`` and ``backward`` do, and say so at the line that calls them."""
    old, new = (TorchBackend(TinyLM(VOCAB)) for _ in range(2))
    with pytest.warns(
        DeprecationWarning, match=r"hold is now pullback\.backends\.TorchBackend\.forward_retain"
    ) as caught:
        held = old.hold(DATA).result()
    with pytest.warns(DeprecationWarning, match=r"pull is now pullback\.backends\.TorchBackend\.backward"):
        old.pull({held: range(len(DATA))}, DATA, "ppo").result()
    assert caught[0].filename == __file__
    new.backward({new.forward_retain(DATA).result(): range(len(DATA))}, DATA, "ppo").result()
    assert distance(old.gradients(), new.gradients()) == 0.0
