"""The service, driven by the official SDK as it is: training, custom losses, checkpoints, sampling, isolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tinker
import torch
from helpers import distance, make_data
from servers import SDK_WARNINGS, adapter, served, twin
from tiers import sampled
from torch import Tensor

from pullback.backends import AdamParams
from pullback.datums import to_tinker
from pullback.errors import DatumError
from pullback.service import ServedModels
from pullback.service.wire.protobuf import decode_request, message

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
@pytest.mark.parametrize("unembed", sampled([False, True], [True]))
def test_the_sdk_trains_as_native_does(service: Any, models: ServedModels, loss: str, unembed: bool) -> None:
    """Three steps over the wire equal three native steps, with and without an adapter on the head."""
    client = trainer(service, train_unembed=unembed)
    native = twin(models, client)
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
    assert distance(adapter(served(models, client)), adapter(native)) < 1e-5


def test_custom_loss_of_the_client(service: Any, models: ServedModels) -> None:
    """forward_backward_custom in the SDK gives the gradient of a native custom call."""

    def confidence(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return -sum((lp.exp().sum() for lp in logprobs), torch.zeros(())), {"mine": 1.0}

    client = trainer(service)
    native = twin(models, client)
    result = client.forward_backward_custom(wire_data("cross_entropy"), confidence).result()
    native.forward_backward_custom(DATA, confidence).result()
    assert result.metrics["mine"] == 1.0
    assert distance(served(models, client).gradients(), native.gradients()) < 1e-4


def test_save_and_restore(service: Any, models: ServedModels) -> None:
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
    assert distance(*(adapter(served(models, c)) for c in (client, again))) == 0.0
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


def test_tenants_do_not_touch_each_other(service: Any, models: ServedModels) -> None:
    """Two models in turns: each is what it is alone; they share the base's tensors."""
    first, second = trainer(service), trainer(service, seed=9)
    alone = twin(models, first)
    for loss in ("cross_entropy", "ppo"):
        first.forward_backward(wire_data(loss), loss)
        second.forward_backward(wire_data("dpo"), "dpo")
        alone.forward_backward(DATA, loss).result()
        first.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        second.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        alone.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert distance(adapter(served(models, first)), adapter(alone)) < 1e-5
    frozen = [
        {p.data_ptr() for p in served(models, c).model.parameters() if not p.requires_grad} for c in (first, second)
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
        "SampledSequence",
        "TopkLogprobs",
        "PromptAltTokens",
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
    (datum,) = decode_request(request.SerializeToString()).data()
    assert datum.loss_fn_inputs["weights"].to_torch().tolist() == [[0, 0, 0.5], [2, 0, 0]]
    with pytest.raises(DatumError, match="no ForwardBackwardRequest"):
        decode_request(b"\xff\xff\xff")


def test_the_old_name_of_the_served_models_is_found() -> None:
    """With a warning that says the new one."""
    import pullback.service

    with pytest.warns(DeprecationWarning, match=r"pullback\.service\.Tenants is now pullback\.service\.ServedModels"):
        assert pullback.service.Tenants is pullback.service.ServedModels
