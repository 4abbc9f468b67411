"""The published examples run as printed on the native backend; `seed_examples.EDITS` lists every edit.

Names that the examples leave undefined (the client, datums, rewards, ...) are given from outside; nothing else is.
"""

from __future__ import annotations

import pytest
import torch
from helpers import distance
from seed_examples import VOCAB, raw_sum, run, weight_datums
from torch import Tensor

import pullback
from pullback import AdamParams, Datum, TorchBackend, preset
from pullback.errors import InvalidDatumsError, NotDifferentiableError, UnretrievedFailureError
from pullback.losses import DPO
from pullback.testing import TinyLM


def client(dtype: torch.dtype = torch.float32) -> TorchBackend:
    """The line that makes the client."""
    return TorchBackend(TinyLM(VOCAB, dtype=dtype), reference=TinyLM(VOCAB, seed=1, dtype=dtype))


def test_both_datum_forms() -> None:
    """The weight-based and the target-based datum are aligned alike."""
    weighted = run("weight_datum", prompt_len=2)
    targets = run("target_datum", tokens=weighted["tokens"])["datum"]
    assert targets.model_input == weighted["datum"].model_input
    assert targets.loss_fn_inputs["target_tokens"] == weighted["datum"].loss_fn_inputs["target_tokens"]
    assert weighted["datum"].loss_fn_inputs["weights"].data == [0, 1, 1, 1]


def test_built_in_and_reference() -> None:
    """The string loss and the forward for reference log-probs."""
    training_client, datums = client(), weight_datums()
    result = run("built_in", training_client=training_client, datums=datums)["result"]
    assert result.metrics["loss:sum"] > 0
    reference = run("reference", training_client=training_client, datums=datums)["ref_logprobs"]
    assert [len(lp) for lp in reference] == [4, 3]


def gradient_of(backend: TorchBackend) -> dict[str, Tensor]:
    found = backend.gradients()
    backend.discard_gradients()
    return found


def test_cross_entropy_closure() -> None:
    """The example's cross-entropy gives what our preset gives, to 1e-6."""
    backend, datums = client(), weight_datums()
    result = run("custom_losses", training_client=backend, datums=datums)["result"]
    theirs = gradient_of(backend)
    ours = backend.forward_backward(datums, preset("seed:cross_entropy")).result()
    assert distance(gradient_of(backend), theirs) < 1e-6
    assert abs(result.metrics["cross_entropy"] - ours.metrics["loss_per_unit:mean"]) < 1e-5


def test_grpo_closure() -> None:
    """The example's GRPO gives what the acknowledged preset gives, to 1e-6."""
    backend, datums = client(), weight_datums()
    scored = backend.reference().forward(datums).result().loss_fn_outputs
    reference = [output["logprobs"].data for output in scored]
    advantages = [1.0, -0.5]
    made = run("grpo", compute_advantages=lambda rewards: rewards)["make_grpo_loss"](advantages, reference, kl_beta=0.1)
    backend.forward_backward_custom(datums, made).result()
    theirs = gradient_of(backend)
    data = [
        d.with_inputs(advantages=[a] * len(d.model_input), ref_logprobs=r)
        for d, a, r in zip(datums, advantages, reference, strict=True)
    ]
    backend.forward_backward(data, preset("seed:grpo", kl_beta=0.1)).result()
    assert distance(gradient_of(backend), theirs) < 1e-6
    backend.forward_backward(data, preset("seed:grpo", kl_beta=0.0)).result()
    assert distance(gradient_of(backend), theirs) > 1e-3


def test_dpo_closure() -> None:
    """The example's DPO gives what our registered DPO gives, to 1e-6."""
    backend, datums = client(), weight_datums()
    chosen, rejected = (o["logprobs"].data for o in backend.reference().forward(datums).result().loss_fn_outputs)
    result = backend.forward_backward_custom(datums, run("dpo")["make_dpo_loss"](chosen, rejected)).result()
    theirs = gradient_of(backend)
    data = [d.with_inputs(ref_logprobs=r) for d, r in zip(datums, (chosen, rejected), strict=True)]
    ours = backend.forward_backward(data, "dpo").result()
    assert distance(gradient_of(backend), theirs) < 1e-6
    assert abs(0.1 * result.metrics["margin"] - ours.metrics["margin:mean"]) < 1e-5
    assert isinstance(preset("seed:dpo"), DPO)


def test_step_accumulation_and_normalization() -> None:
    """The optimizer step, accumulation, and each normalisation mode."""
    datums = weight_datums()
    whole, split = client(torch.float64), client(torch.float64)
    run("step", training_client=whole, datums=datums, loss_fn=raw_sum)
    run("accumulation", training_client=split, micro_batches=[datums[:1], datums[1:]], loss_fn=raw_sum)
    assert whole.weights_version == split.weights_version == 1
    backend = client()
    run("normalization", training_client=backend, datums=datums, loss_fn=raw_sum)
    for mode, divisor in (("num_loss_tokens", 7), ("num_sequences", 2), (None, 1)):
        backend.forward_backward_custom(datums, raw_sum).result()
        assert backend.optim_step(AdamParams(), mode).result().divided_by == divisor  # type: ignore[arg-type]


def test_pitfalls() -> None:
    """Misalignment raises instead of being cut; metrics come with every step; failures surface; no gradient is an error."""
    backend, datums = client(), weight_datums()
    short = [datums[0].with_inputs(weights=[1.0]), datums[1]]
    with pytest.raises(InvalidDatumsError, match="nothing is truncated"):
        backend.forward_backward_custom(short, raw_sum).result()
    assert backend.forward_backward_custom(datums, raw_sum).result().metrics["loss"] > 0
    assert backend.optim_step(AdamParams()).result().metrics["grad_norm"] > 0
    with pytest.raises(NotDifferentiableError):
        backend.forward_backward_custom(datums, lambda d, lp: (torch.tensor(1.0), {})).result()
    forgotten = backend.forward_backward_custom(short, raw_sum)
    with pytest.raises(UnretrievedFailureError, match="weights"):
        backend.close()
    del forgotten


def test_datum_without_targets() -> None:
    """A hand-made datum without targets is scored on its own next tokens; the string loss says what is missing."""
    backend = client()
    bare = [Datum(pullback.ModelInput.from_ints([5, 6, 7]), {"weights": [0.0, 1.0]})]
    result = run("custom_losses", training_client=backend, datums=bare)["result"]
    assert len(result.loss_fn_outputs[0]["logprobs"].data) == 2
    with pytest.raises(InvalidDatumsError, match="missing required field 'target_tokens'"):
        run("built_in", training_client=backend, datums=bare)
