"""The service, driven by the official SDK as it is: training, custom losses, checkpoints, sampling, isolation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from helpers import distance, make_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import SDK_WARNINGS, adapter, served, twin
from torch import Tensor

from pullback.backends import AdamParams
from pullback.datums import to_tinker
from pullback.errors import ConfigError, DatumError, ServiceError
from pullback.service import Tenants
from pullback.service.operations import Operations
from pullback.service.sequencer import Failure, Sequencer
from pullback.service.serving import serve_forever
from pullback.service.wire import decode_request, message

pytestmark = SDK_WARNINGS
DATA = make_data([6, 5, 7, 4])
FOR = {
    "cross_entropy": ("target_tokens", "weights"),
    "importance_sampling": ("target_tokens", "logprobs", "advantages", "weights"),
    "ppo": ("target_tokens", "logprobs", "advantages", "weights"),
    "grpo": ("target_tokens", "logprobs", "advantages", "weights", "group_id"),
    "dpo": ("target_tokens", "weights", "ref_logprobs"),
}


def wire_data(loss: str) -> list[tinker.Datum]:
    kept = [type(d)(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k in FOR[loss]}) for d in DATA]
    return to_tinker(kept)


def trainer(service: tinker.ServiceClient, **options: Any) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", **{"rank": 4, "seed": 3, **options}).result()


@pytest.mark.parametrize("loss", FOR)
@pytest.mark.parametrize("unembed", [False, True])
def test_the_sdk_trains_as_native_does(service: Any, tenants: Tenants, loss: str, unembed: bool) -> None:
    """Three steps over the wire equal three native steps, with and without an adapter on the head."""
    client = trainer(service, train_unembed=unembed)
    native = twin(tenants, client)
    for _ in range(3):
        result = client.forward_backward(wire_data(loss), loss).result()
        expected = native.forward_backward(DATA, loss).result()
        assert result.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
        for one, datum in zip(result.loss_fn_outputs, DATA, strict=True):
            assert one["logprobs"].shape == [len(datum.model_input)]
        step = client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        assert step.metrics["grad_norm"] == pytest.approx(
            native.optim_step(AdamParams(learning_rate=1e-2)).result().metrics["grad_norm"], rel=1e-4
        )
    assert distance(adapter(served(tenants, client)), adapter(native)) < 1e-5


def test_custom_loss_of_the_client(service: Any, tenants: Tenants) -> None:
    """forward_backward_custom in the SDK gives the gradient of a native custom call."""

    def confidence(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return -sum((lp.exp().sum() for lp in logprobs), torch.zeros(())), {"mine": 1.0}

    client = trainer(service)
    native = twin(tenants, client)
    result = client.forward_backward_custom(wire_data("cross_entropy"), confidence).result()
    native.forward_backward_custom(DATA, confidence).result()
    assert result.metrics["mine"] == 1.0
    assert distance(served(tenants, client).gradients(), native.gradients()) < 1e-4


def test_save_and_restore(service: Any, tenants: Tenants) -> None:
    """A training client made from a state takes the step that the first one takes; a name is not overwritten."""
    client = trainer(service)
    params = tinker.AdamParams(learning_rate=1e-2)
    for _ in range(2):
        client.forward_backward(wire_data("cross_entropy"), "cross_entropy").result()
        client.optim_step(params).result()
    path = client.save_state("one").result().path
    again = service.create_training_client_from_state_with_optimizer(path).result()
    for one in (client, again):
        one.forward_backward(wire_data("cross_entropy"), "cross_entropy").result()
        one.optim_step(params).result()
    assert distance(*(adapter(served(tenants, c)) for c in (client, again))) == 0.0
    with pytest.raises(tinker.RequestFailedError, match="exists"):
        client.save_state("one").result()
    with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
        service.create_training_client_from_state(path.replace("one", "two")).result()


def test_sampling_agrees_with_forward(service: Any) -> None:
    """Sampled log-probs, compute_logprobs and forward say the same; a snapshot does not follow the training."""
    client = trainer(service)
    data = wire_data("cross_entropy")
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = tinker.ModelInput.from_ints([1, 5, 6])
    params = tinker.SamplingParams(max_tokens=5, temperature=1.0, stop=[])
    result = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    for sequence in result.sequences:
        whole = [1, 5, 6, *sequence.tokens]
        scored = sampler.compute_logprobs(tinker.ModelInput.from_ints(whole)).result()
        assert scored[0] is None
        assert scored[3:] == pytest.approx(sequence.logprobs, abs=1e-4)
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(whole[:-1]),
            loss_fn_inputs={"target_tokens": whole[1:], "weights": [1.0] * (len(whole) - 1)},
        )
        forward = client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
        assert scored[1:] == pytest.approx(forward, abs=1e-4)
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(tinker.AdamParams(learning_rate=0.1)).result()
    assert sampler.compute_logprobs(tinker.ModelInput.from_ints(whole)).result() == scored


def test_tenants_do_not_touch_each_other(service: Any, tenants: Tenants) -> None:
    """Two models in turns: each is what it is alone; they share the base's tensors."""
    first, second = trainer(service), trainer(service, seed=9)
    alone = twin(tenants, first)
    for loss in ("cross_entropy", "ppo"):
        first.forward_backward(wire_data(loss), loss)
        second.forward_backward(wire_data("dpo"), "dpo")
        alone.forward_backward(DATA, loss).result()
        first.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        second.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        alone.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert distance(adapter(served(tenants, first)), adapter(alone)) < 1e-5
    frozen = [
        {p.data_ptr() for p in served(tenants, c).model.parameters() if not p.requires_grad} for c in (first, second)
    ]
    assert frozen[0] == frozen[1]


def test_failures_reach_the_client(service: Any) -> None:
    """A bad datum fails its future with our words; training goes on."""
    client = trainer(service)
    with pytest.raises(tinker.RequestFailedError, match="missing required field 'logprobs'"):
        client.forward_backward(wire_data("cross_entropy"), "ppo").result()
    with pytest.raises(tinker.RequestFailedError, match="did you mean"):
        client.forward_backward(wire_data("ppo"), "pqo").result()
    client.forward_backward(wire_data("ppo"), "ppo").result()
    assert client.optim_step(tinker.AdamParams()).result().metrics["grad_norm"] > 0


def body(model_id: str, seq_id: int, loss: str, kind: str = "ppo") -> bytes:
    """A forward_backward request as the SDK writes it."""
    request = message("ForwardBackwardRequest")(model_id=model_id, seq_id=seq_id, loss_fn=loss)
    for datum in wire_data(kind):
        one = request.data.add()
        one.model_input.add().encoded_text.tokens = torch.tensor(datum.model_input.to_ints()).int().numpy().tobytes()
        for key, value in datum.loss_fn_inputs.items():
            tensor = value.to_torch()
            one.loss_fn_inputs[key].dense = tensor.numpy().tobytes()
            one.loss_fn_inputs[key].dtype = 2 if tensor.dtype == torch.int64 else 1
            one.loss_fn_inputs[key].shape.extend(tensor.shape)
    return bytes(request.SerializeToString())


def step_body(model_id: str, seq_id: int) -> tuple[bytes, dict[str, Any]]:
    given = {"model_id": model_id, "seq_id": seq_id, "adam_params": {"learning_rate": 1e-2}}
    return json.dumps(given).encode(), given


@pytest.fixture
def operations(tenants: Tenants) -> Iterator[Operations]:
    found = Operations(tenants, Sequencer())
    model = {"session_id": "direct", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
    assert found.sequencer.result(found.create_model(model)).result()["model_id"] == "direct:train:0"
    yield found
    found.sequencer.close()


def send(operations: Operations, raw: bytes) -> str:
    return operations.gradient(raw, *decode_request(raw))


def test_a_step_sent_before_a_failure_is_known_is_refused(operations: Operations) -> None:
    """Pipelined behind a gradient that fails, a step makes nothing; sent after the failure was delivered, it does."""
    model = "direct:train:0"
    good, bad = send(operations, body(model, 1, "ppo")), send(operations, body(model, 2, "dpo"))
    blind = operations.sequencer.result(operations.optim_step(*step_body(model, 3))).result()
    assert isinstance(blind, Failure)
    assert "ref_logprobs" in blind.text
    assert isinstance(operations.sequencer.result(bad).result(), Failure)
    for request in (good, bad):
        operations.delivered(request)
    seen = operations.sequencer.result(operations.optim_step(*step_body(model, 4))).result()
    assert seen["metrics"]["grad_norm"] > 0


@given(order=st.permutations(range(5)), repeats=st.lists(st.integers(0, 4), max_size=4))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_and_repetition_do_not_matter(operations: Operations, order: list[int], repeats: list[int]) -> None:
    """Requests that arrive in any order, some of them twice, run once and by their numbers."""
    line = Sequencer()
    line.open("model")
    ran: list[int] = []
    for number in [*order, *repeats]:
        line.submit("model", number + 1, b"%d" % number, lambda number=number: ran.append(number))  # type: ignore[misc]
    requests = [line.submit("model", n + 1, b"%d" % n, lambda: ran.append(99)) for n in range(5)]
    for request in requests:
        line.result(request).result(timeout=10)
    assert ran == [0, 1, 2, 3, 4]
    with pytest.raises(ServiceError, match="another request"):
        line.submit("model", 2, b"other", lambda: None)
    with pytest.raises(ServiceError, match="unknown model"):
        line.submit("none", 1, b"", lambda: None)
    line.close()


def test_wire_is_the_sdks(service: Any) -> None:
    """The messages built from our table are the SDK's, field by field; sparse tensors are filled up."""
    from tinker.proto import tinker_public_pb2 as theirs

    for name in (
        "ForwardBackwardRequest",
        "ForwardBackwardOutput",
        "ArrayRecord",
        "BatchedTensor",
        "Tensor",
        "SampleResponse",
    ):
        ours = message(name).DESCRIPTOR.fields_by_name
        reference = getattr(theirs, name).DESCRIPTOR.fields_by_name
        for key, field in ours.items():
            assert field.number == reference[key].number, (name, key)
            assert field.is_repeated == reference[key].is_repeated
            assert {field.type, reference[key].type} <= {5, 14} or field.type == reference[key].type
    request = message("ForwardBackwardRequest")(model_id="m", seq_id=1, loss_fn="cross_entropy")
    one = request.data.add()
    one.model_input.add().encoded_text.tokens = torch.tensor([1, 2]).int().numpy().tobytes()
    sparse = one.loss_fn_inputs["weights"]
    sparse.dtype = 1
    sparse.shape.extend([2, 3])
    sparse.sparse_csr.values = torch.tensor([0.5, 2.0]).numpy().tobytes()
    sparse.sparse_csr.crow_indices = torch.tensor([0, 1, 2]).numpy().tobytes()
    sparse.sparse_csr.col_indices = torch.tensor([2, 0]).numpy().tobytes()
    _, (datum,), _ = decode_request(request.SerializeToString())
    assert datum.loss_fn_inputs["weights"].to_torch().tolist() == [[0, 0, 0.5], [2, 0, 0]]
    with pytest.raises(DatumError, match="no ForwardBackwardRequest"):
        decode_request(b"\xff\xff\xff")


def test_keys_and_addresses(url: str, tenants: Tenants) -> None:
    """A wrong key is turned away; an address beyond loopback needs keys."""
    with pytest.raises(tinker.AuthenticationError):
        tinker.ServiceClient(base_url=url, api_key="tml-other").create_lora_training_client("tiny", rank=2).result()
    with pytest.raises(ConfigError, match="API key"):
        serve_forever(tenants, "0.0.0.0", 0, [])


def test_checkpoints_stay_in_their_folder(service: Any, tenants: Tenants) -> None:
    """Names that lead elsewhere are refused."""
    client = trainer(service)
    with pytest.raises(tinker.RequestFailedError, match="no folders"):
        client.save_state("..").result()
    for uri in ("tinker://../weights/x", f"tinker://{client.model_id}/weights/..", "file:///etc"):
        with pytest.raises(Exception, match="checkpoint"):
            tenants.locate(uri)
    assert isinstance(tenants.root, Path)
