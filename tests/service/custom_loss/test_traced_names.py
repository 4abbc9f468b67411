"""What the SDK's tracer calls an operation is what the list of allowed ones calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import tinker
import torch
from tinker.lib.public_interfaces.custom_loss import encode_graph, run_loss_handle, trace_loss
from torch import Tensor
from torch.fx.node import _get_qualified_name
from torch.nn import functional

from pullback.datums import Datum, ModelInput
from pullback.service.custom_loss.allowlist import FUNCTIONS
from pullback.service.custom_loss.interpreter import LossGraph

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith("torch.")])
def test_every_function_is_found_by_its_traced_name(name: str) -> None:
    """Some are defined elsewhere, under another name."""
    assert FUNCTIONS[_get_qualified_name(FUNCTIONS[name])] is FUNCTIONS[name]


def preference(logprobs: Tensor, ref: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return -functional.logsigmoid(0.1 * (logprobs - ref).sum()), {}


def largest(logprobs: Tensor, ref: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    worst = logprobs.topk(2, largest=False)
    return -worst.values.sum() + (ref.max(0).values - logprobs.sort().values[0]) ** 2, {
        "custom/at:sum": worst.indices[0]
    }


def thresholded(logprobs: Tensor, ref: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return functional.threshold(logprobs, -1.0, 0.0).sum() + torch.norm(logprobs - ref), {}


@pytest.mark.parametrize("loss", [preference, largest, thresholded])
def test_traced_losses_are_those_of_the_sdk(loss: Loss) -> None:
    """Value, gradient and metrics of the graph as the SDK runs it itself."""
    names = list(inspect.signature(loss).parameters)
    handle = trace_loss(loss, dict.fromkeys(names, 1), "session")
    inputs = [{"name": name, "rank": 1} for name in names]
    graph = LossGraph.of({"name": "loss", "inputs": inputs, "graph": encode_graph(handle).model_dump()})
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = (-2 * torch.rand(5, generator=generator) for _ in range(2))
    theirs = tinker.Datum(model_input=tinker.ModelInput.from_ints([1] * 5), loss_fn_inputs={"ref": ref})
    ours = Datum(ModelInput.from_ints([1] * 5), {"ref": ref})
    found = _run(graph, [ours], logprobs)
    wanted = _run(lambda data, leaves: run_loss_handle(handle, data, leaves), [theirs], logprobs)
    torch.testing.assert_close(found, wanted)


def _run(loss: Any, data: list[Any], logprobs: Tensor) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    leaf = logprobs.clone().requires_grad_()
    value, metrics = loss(data, [leaf])
    value.backward()
    return value.detach(), leaf.grad, metrics


def test_a_field_is_one_of_what_torch_returned() -> None:
    """Not of a tuple that was sent, nor of a tensor."""
    for what in ({"tuple": [{"ref": "logprobs"}]}, {"ref": "logprobs"}):
        nodes = [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": []},
            {"op": "call_function", "name": "n0", "target": "builtins.getattr", "args": [what, "values"]},
            {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "n0"}, {"dict": {}}]}]},
        ]
        body = {"inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": nodes}}
        with pytest.raises(ValueError, match=r"node n0 .* failed"):
            LossGraph.of(body)([Datum(ModelInput.from_ints([1, 2]), {})], [torch.zeros(2, requires_grad=True)])
