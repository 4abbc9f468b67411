"""Custom losses at the service: the graph cache, traced losses, and the JSON form."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import httpx
import pytest
import tinker
import torch
from helpers import distance, make_data
from hypothesis import given
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS, Counting, finished, json_datum, new_model, served, twin
from torch import Tensor

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import RetainedForward
from pullback.backends.native.execution.memory import available_bytes
from pullback.datums import Datum, ModelInput, to_tinker
from pullback.errors import ConfigError
from pullback.service.custom_loss.gradients import MISTAKES
from pullback.service.custom_loss.interpreter import LossGraph
from pullback.service.training.graph_cache import GraphCache, datum_keys
from pullback.testing import TinyLM

pytestmark = SDK_WARNINGS


def data() -> list[Datum]:
    """Every position is trained."""
    kept = ("target_tokens", "advantages")
    return [
        Datum(d.model_input, {k: d.loss_fn_inputs[k] for k in kept} | {"weights": [1.0] * len(d.model_input)})
        for d in make_data([6, 5, 7, 4])
    ]


def nll(_: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.cat(logprobs).sum(), {}


@pytest.mark.parametrize("unembed", [False, True])
def test_a_custom_loss_costs_one_forward(service: Any, models: Any, unembed: bool) -> None:
    """By the official SDK: the FLOPs of the built-in loss with a frozen head, and its gradient."""
    trainer = service.create_lora_training_client("tiny", rank=4, train_unembed=unembed).result()
    native = twin(models, trainer)
    wire = to_tinker(sums())
    counts = {}
    with Counting() as counter:
        trainer.forward_backward(wire, "cross_entropy").result()
    counts["built-in"] = counter.total
    served(models, trainer).discard_gradients()
    with Counting() as counter:
        metrics = trainer.forward_backward_custom(wire, nll).result().metrics
    counts["custom"] = counter.total
    assert metrics["reused_tokens:sum"] == 22
    assert metrics["forward_tokens:sum"] == 0
    ratio = counts["custom"] / counts["built-in"]
    assert ratio == 1.0 if not unembed else ratio < 1.3  # a tiny model is mostly head; SmolLM2's ratio is in the soak
    native.forward_backward(data(), "cross_entropy").result()
    assert distance(served(models, trainer).gradients(), native.gradients()) < 1e-5


def contrast(_: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.nn.functional.logsigmoid(logprobs[0][:3].sum() - logprobs[1][:3].sum()), {}


@pytest.mark.parametrize("retained", [True, False])
def test_a_cotangent_is_no_weight_of_a_likelihood(
    service: Any, retained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a pair add up to nothing, a mean by them would be NaN: it is not reported, all else is a number."""
    if not retained:
        monkeypatch.setattr(GraphCache, "take", lambda *_: {})
    trainer, wire = service.create_lora_training_client("tiny", rank=4).result(), to_tinker(sums()[:2])
    metrics = trainer.forward_backward_custom(wire, contrast).result().metrics
    assert ("reused_tokens:sum" in metrics) is retained
    assert not any(name.startswith("nll") for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert trainer.forward_backward(wire, "cross_entropy").result().metrics["nll:mean"] > 0


def held(tokens: list[int]) -> tuple[list[str], RetainedForward]:
    backend, given = TorchBackend(TinyLM()), make_data(tokens)
    return datum_keys(given), backend.forward_retain(given).result()


def test_graphs_are_bounded_by_time_and_bytes_and_by_use() -> None:
    """Old ones go, a model whose entries are never used gets none any more (but is tried again), a step drops all."""
    now = [0.0]
    graphs = GraphCache(1e9, 10.0, clock=lambda: now[0])
    keys, one = held([5, 4])
    graphs.add("m", keys, one)
    assert graphs.budget == 1e9 - one.bytes
    assert graphs.take("other", keys) == {}
    assert graphs.take("m", keys[:1]) == {}  # a part of it would waste the rest
    assert graphs.take("m", [keys[1], keys[0], *keys]) == {one: [1, 0]}
    assert graphs.take("m", keys) == {}
    graphs.add("m", keys, one)
    now[0] = 11.0
    assert graphs.budget == 1e9
    graphs.add("m", keys, one)
    graphs.drop("m")
    assert graphs.bytes == 0
    assert 0 < GraphCache(None, 10.0).budget < 0.6 * available_bytes(torch.device("cpu"))
    tried = []
    for _ in range(64):
        tried.append(graphs.is_worthwhile("idle"))
        if tried[-1]:
            graphs.add("idle", keys, one)
    assert all(tried[:8])
    assert 1 <= sum(tried[8:]) <= 4


def test_a_plain_forward_holds_no_graph(service: Any, models: Any, url: str) -> None:
    """Only the graphs of the SDK's custom calls are cached."""
    trainer = service.create_lora_training_client("tiny", rank=4).result()
    trainer.forward(to_tinker(sums()), "cross_entropy").result()
    text = httpx.get(f"{url}/metrics", headers={"x-api-key": KEY}).text
    assert "pullback_graph_bytes 0.0" in text


def sums() -> list[Datum]:
    return [Datum(d.model_input, {k: d.loss_fn_inputs[k] for k in ("target_tokens", "weights")}) for d in data()]


def clipped(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss as create_custom_loss takes it."""
    ratio = torch.exp(logprobs - logprobs.detach() + 0.1)
    surrogate = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    smooth = torch.nn.functional.softplus(-logprobs)[1:].mean() * weights.sum() / weights.shape[0]
    loss = -(surrogate * weights).sum() + 0.01 * smooth - logprobs.logsumexp(-1)
    return loss, {"custom/ratio:mean": ratio.detach().mean(), "custom/tokens:sum": (weights > 0).sum()}


def test_a_traced_loss_runs_at_the_service(service: Any, models: Any) -> None:
    """create_custom_loss: one operation, and the gradient and metrics of the same function here."""
    ranks = {"logprobs": 1, "advantages": 1, "weights": 1}
    handle = service.create_custom_loss(clipped, input_ranks=ranks)
    handle = handle.result() if hasattr(handle, "result") else handle
    assert handle.loss_id is not None
    trainer = service.create_lora_training_client("tiny", rank=4).result()
    native = twin(models, trainer)
    result = trainer.forward_backward_custom(to_tinker(data()), handle).result()

    def same(given: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        found = []
        for one, own in zip(given, logprobs, strict=True):
            found.append(clipped(own, *(one.loss_fn_inputs[key].to_torch() for key in ("advantages", "weights"))))
        tokens = sum(float(metrics["custom/tokens:sum"]) for _, metrics in found)
        return torch.stack([loss for loss, _ in found]).sum(), {"tokens": tokens}

    expected = native.forward_backward_custom(data(), same).result()
    assert result.metrics["custom/tokens:sum"] == expected.metrics["tokens"]
    assert result.metrics["custom/ratio:mean"] == pytest.approx(math.exp(0.1), rel=1e-5)
    assert distance(served(models, trainer).gradients(), native.gradients()) < 1e-5
    assert trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)).result().metrics["grad_norm"] > 0


def graph(*nodes: tuple[str, str, Any]) -> dict[str, Any]:
    """A loss of log-probs alone, ending in node ``n<last>``."""
    encoded: list[Any] = [{"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": []}]
    for i, (op, target, args) in enumerate(nodes):
        encoded.append({"op": op, "name": f"n{i}", "target": target, "args": args})
    returned = {"tuple": [{"ref": f"n{len(nodes) - 1}"}, {"dict": {}}]}
    encoded.append({"op": "output", "name": "output", "target": "output", "args": [returned]})
    return {"name": "bad", "inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": encoded}}


REF = {"ref": "logprobs"}
REFUSED_WHEN_READ: dict[str, Any] = {
    "os.system": ("call_function", "os.system", ["true"]),
    "builtins.eval": ("call_function", "builtins.eval", ["1"]),
    "torch.load": ("call_function", "torch.load", ["/etc/passwd"]),
    "torch.zeros": ("call_function", "torch.zeros", [10**9]),
    "a dunder method": ("call_method", "__reduce__", [REF]),
    "repeat": ("call_method", "repeat", [REF, 10**9]),
    "backward": ("call_method", "backward", [REF]),
    "a module": ("call_module", "layer", [REF]),
    "an attribute": ("get_attr", "weight", []),
}
REFUSED_WHEN_RUN: dict[str, Any] = {
    "an attribute of a tensor": [("call_function", "builtins.getattr", [REF, "__class__"])],
    "a tower of powers": [("call_function", "operator.pow", [10, 10**6])],
    "a large outer product": [
        ("call_method", "reshape", [REF, -1, 1]),
        *[("call_function", "torch.cat", [[{"ref": f"n{i}"}] * 64]) for i in range(2)],
        ("call_method", "reshape", [{"ref": "n2"}, 1, -1]),
        ("call_function", "operator.mul", [{"ref": "n2"}, {"ref": "n3"}]),
    ],
    "an unknown reference": [("call_method", "sum", [{"ref": "nobody"}])],
    "a method of a number": [("call_method", "sum", [3])],
}


@pytest.mark.parametrize("case", REFUSED_WHEN_READ)
def test_operations_off_the_list_are_refused_when_they_arrive(case: str) -> None:
    """Before anything of the graph has run."""
    with pytest.raises(ConfigError, match="on this server"):
        LossGraph.of(graph(REFUSED_WHEN_READ[case]))


@pytest.mark.parametrize("case", REFUSED_WHEN_RUN)
def test_what_would_grow_is_refused_before_it_does(case: str) -> None:
    """Sizes and attributes are known only when the graph runs."""
    loss = LossGraph.of(graph(*REFUSED_WHEN_RUN[case]))
    with pytest.raises((ConfigError, ValueError)):
        loss(data()[:1], [torch.zeros(6, requires_grad=True)])


node_names = st.sampled_from(["logprobs", "n0", "n1", "n2", "nobody"])
leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4)
encoded = st.recursive(
    leaves | st.builds(lambda name: {"ref": name}, node_names),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.builds(lambda items: {"tuple": items}, st.lists(inner, max_size=2))
        | st.dictionaries(st.sampled_from(["slice", "dtype", "float", "dict", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
kinds = st.sampled_from(["call_function", "call_method"])
targets = st.sampled_from(["operator.add", "torch.where", "sum", "torch.exp", "operator.getitem", "topk", "view"])
graph_nodes = st.lists(st.tuples(kinds, targets, st.lists(encoded, max_size=3)), min_size=1, max_size=3)


@given(nodes=graph_nodes)
def test_malformed_graphs_are_the_clients_mistake(nodes: Any) -> None:
    """Whatever is in it, the failure says so, and nothing but a failure comes of it."""
    with contextlib.suppress(*MISTAKES):
        LossGraph.of(graph(*nodes))(data()[:1], [torch.zeros(6, requires_grad=True)])


def test_the_json_form(web: Any, url: str, models: Any) -> None:
    """Clients without protobuf: forward, forward_backward, a normalised step, as natively."""
    http = web(url)
    _, made = new_model(http)
    model = made["model_id"]
    native = twin(models, type("Client", (), {"model_id": model}))
    tokens = [[3, 1, 4, 1], [5, 9, 2]]
    inner = {"data": [json_datum(t) for t in tokens], "loss_fn": "cross_entropy", "loss_fn_config": {}}
    given = [Datum(ModelInput.from_ints(t), {"target_tokens": t, "weights": [1.0] * len(t)}) for t in tokens]
    sent = {"model_id": model, "seq_id": 1, "forward_input": inner}
    scored = finished(http, http.post("forward", json=sent).json()["request_id"])
    expected = native.forward(given).result().loss_fn_outputs
    for one, other in zip(scored["loss_fn_outputs"], expected, strict=True):
        assert one["logprobs"]["data"] == pytest.approx(other["logprobs"].to_torch().tolist(), abs=1e-5)
    sent = {"model_id": model, "seq_id": 2, "forward_backward_input": inner}
    result = finished(http, http.post("forward_backward", json=sent).json()["request_id"])
    same = native.forward_backward(given, "cross_entropy").result()
    assert result["metrics"]["loss:sum"] == pytest.approx(same.metrics["loss:sum"], rel=1e-5)
    step = {"model_id": model, "seq_id": 3, "adam_params": {"learning_rate": 0.01}}
    step["grad_accumulation_normalization"] = "num_loss_tokens"
    norm = finished(http, http.post("optim_step", json=step).json()["request_id"])["metrics"]["grad_norm"]
    wanted = native.optim_step(AdamParams(learning_rate=0.01), "num_loss_tokens").result()
    assert norm == pytest.approx(wanted.metrics["grad_norm"], rel=1e-4)
    assert json.dumps(result)
