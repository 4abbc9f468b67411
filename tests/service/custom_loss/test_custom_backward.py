"""A custom loss that cannot be differentiated is its sender's mistake; one that can be has its gradient unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from servers import MODEL, Direct, json_datum

from pullback.backends import TorchBackend
from pullback.errors import ConfigError
from pullback.service.custom_loss import interpreter
from pullback.service.custom_loss.gradients import differentiated
from pullback.service.custom_loss.interpreter import LossGraph
from pullback.service.durability.answers import Failure
from pullback.service.wire.json_form import decode_json_request

REF, LAST = {"ref": "logprobs"}, {"ref": "last"}
TOKENS = [3, 4, 5, 6]


def loss(*nodes: tuple[str, str, list[Any]]) -> dict[str, Any]:
    """A graph of log-probs whose nodes each read the one before; the last one's sum is the loss."""
    encoded: list[Any] = [{"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": []}]
    for i, (op, target, args) in enumerate([*nodes, ("call_method", "sum", [LAST])]):
        given = [{"ref": f"n{i - 1}"} if arg == LAST else arg for arg in args]
        encoded.append({"op": op, "name": f"n{i}", "target": target, "args": given})
    returned = {"tuple": [{"ref": f"n{len(nodes)}"}, {"dict": {}}]}
    encoded.append({"op": "output", "name": "output", "target": "output", "args": [returned]})
    return {"name": "sent", "inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": encoded}}


DOUBLE = ("call_method", "double", [REF])
HUBER = loss(DOUBLE, ("call_function", "torch.nn.functional.huber_loss", [REF, LAST]))  # its gradient wants one dtype
GOOD = loss(("call_method", "exp", [REF]))
GATHERED = loss(("call_method", "argsort", [REF]), ("call_method", "gather", [REF, 0, LAST]))


def sent(direct: Direct, number: int, body: dict[str, Any]) -> Any:
    """The answer to a gradient of a custom loss."""
    made = {"session_id": "sess", "custom_loss_seq_id": number, **body}
    loss_id = direct.read(direct.operations.training.create_loss("me", json.dumps(made).encode(), made))["loss_id"]
    inner = {"data": [json_datum(TOKENS)], "loss_fn": "custom", "loss_fn_config": {"loss_id": loss_id}}
    request = decode_json_request({"model_id": MODEL, "seq_id": number, "forward_backward_input": inner}, False, False)
    return direct.read(direct.operations.training.gradient("me", request))


def test_whose_mistake_it_is(direct: Direct) -> None:
    """The user's, in words; what it was sent to goes on, and has no gradient of it."""
    answer = sent(direct, 1, HUBER)
    assert isinstance(answer, Failure)
    assert (answer.category, answer.text[:28]) == ("user", "the gradient of sent failed:")
    assert not direct.models.backends[MODEL].gradients()
    assert not isinstance(sent(direct, 2, GOOD), Failure)
    assert direct.read(direct.call("optim_step", 3))["metrics"]["grad_norm"] > 0


def test_a_sparse_gradient_is_taken_as_any_other(direct: Direct) -> None:
    """``gather`` may be asked for one, which says the same in another form."""
    dense = sent(direct, 1, GATHERED)
    assert not isinstance(dense, Failure)
    expected = {name: gradient.clone() for name, gradient in direct.models.backends[MODEL].gradients().items()}
    sparse = json.loads(json.dumps(GATHERED))
    sparse["graph"]["nodes"][2]["kwargs"] = {"sparse_grad": True}
    assert not isinstance(sent(direct, 2, sparse), Failure)
    for name, gradient in direct.models.backends[MODEL].gradients().items():
        assert torch.equal(gradient, 2 * expected[name])


@pytest.mark.slow
def test_without_it_the_server_would_be_blamed(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: differentiated by the backend alone, the same graph is a failure of the server's."""
    monkeypatch.setattr(interpreter, "differentiated", lambda name, loss, logprobs: loss)
    assert sent(direct, 1, HUBER).category == "server"


@pytest.mark.slow
def test_the_models_own_backward_is_not_the_users(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault behind the loss stays the server's."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(TorchBackend, "forward_backward_custom", fail)
    assert sent(direct, 1, GOOD).category == "server"


@given(numbers=st.lists(st.floats(-5, 0, width=32), min_size=1, max_size=8), scale=st.floats(-3, 3, width=32))
def test_the_gradient_is_autograds(numbers: list[float], scale: float) -> None:
    """Of two leaves, one of which the loss does not read; whatever the slope that comes from above."""
    own, unread = torch.tensor(numbers, requires_grad=True), torch.zeros(2, requires_grad=True)
    expected = torch.autograd.grad(scale * own.exp().sum(), own)[0]
    found = torch.autograd.grad(
        scale * differentiated("x", own.exp().sum(), [own, unread]), [own, unread], allow_unused=True
    )
    assert torch.equal(found[0], expected)
    assert found[1] is None


def test_what_depends_on_nothing_is_left_to_the_contract() -> None:
    """It is refused as any function's is, and not here."""
    constant, leaf = torch.ones(()), torch.zeros(2, requires_grad=True)
    assert differentiated("x", constant, [leaf]) is constant
    with pytest.raises(ConfigError, match="the gradient of sent failed"):
        LossGraph.of(HUBER)([type("Datum", (), {"loss_fn_inputs": {}})], [torch.zeros(3, requires_grad=True)])
